"""The installed command ``vllm-kvzip``."""
