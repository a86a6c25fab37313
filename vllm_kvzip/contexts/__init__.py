"""Compressed contexts as files: what a file holds, the folder they lie in, whom they fit."""
