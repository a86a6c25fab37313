"""How many head pages each head keeps, and which KV pairs fill them."""
