"""What is known of a model: its kinds of attention, its rotary embedding, torch's attention."""
