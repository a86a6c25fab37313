"""Formats of quantized pages, one a file; ``../base.py`` has the contract."""
