"""Attention over compressed and other requests, on CPUs and GPUs."""
