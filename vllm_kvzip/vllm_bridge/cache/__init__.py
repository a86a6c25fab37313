"""vLLM's KV cache as head pages."""
