"""Start-up: what was asked for, whether it fits, and the engine's configuration."""
