"""The model runs beside vLLM's steps: to score a context, to make a profile."""
