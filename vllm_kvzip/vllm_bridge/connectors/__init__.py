"""KV connectors beside compression: which ones work, and what they are shown of a row."""
