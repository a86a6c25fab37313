"""The workers: requests are followed, prompts compressed, rows rewritten."""
