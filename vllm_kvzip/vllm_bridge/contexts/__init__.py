"""Compressed contexts that leave an engine as files, and come into one."""
