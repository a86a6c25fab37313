"""Controls: scorers that look at next to nothing, one a file."""
