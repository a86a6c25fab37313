"""Profiles of a model's heads: files, networks, and how both are made."""
