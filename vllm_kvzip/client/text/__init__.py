"""Documents as text: files are read, split into parts, and searched for what an answer says."""
