"""Triton kernels (``vllm_kvzip.kernels``), each with its plain-torch reference beside it."""
