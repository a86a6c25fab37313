"""vllm-kvzip: a vLLM plugin that compresses the KV cache per attention head after prefill."""

__version__ = "0.1.0"
