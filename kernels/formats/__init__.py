"""Triton code of the formats of quantized pages, one a file; see ``../quantized_tiles.py``."""
