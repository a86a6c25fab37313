"""What a model's configuration says of its attention layers.

Configurations are read by the names that transformers gives their fields, so that the engine and
the scripts agree on which models can be compressed.
"""

from __future__ import annotations

from typing import Any

WINDOW_FIELDS = ("sliding_window", "interleaved_sliding_window")


def sliding_window(config: Any) -> int | None:
    """Tokens that the narrowest layer looks back on, its own among them.

    Args:
        config: of the text model, in transformers' format.

    Returns:
        None when no layer slides; 0 when some layers do, and how far is not said.
    """
    windows: list[int] = []
    for field in WINDOW_FIELDS:
        value = getattr(config, field, None)
        values = value if isinstance(value, list | tuple) else [value]
        windows += [window for window in values if isinstance(window, int) and window > 0]
    if windows:
        return min(windows)
    return 0 if "sliding_attention" in (getattr(config, "layer_types", None) or ()) else None


def slides_within(config: Any, num_tokens: int) -> bool:
    """Whether any layer of a model loses sight of the first of so many tokens.

    A window that holds all of them slides nowhere: the layer then attends like any other.
    """
    window = sliding_window(config)
    return window is not None and window < num_tokens
