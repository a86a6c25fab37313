"""The API server: requests are checked, contexts are compressed by name."""
