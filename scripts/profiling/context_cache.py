"""A model's cache of one context, and copies of it for passes that go on from the context.

Layers that are scored attend to the whole context, and can be shown a part of it. Layers with a
sliding window hold the last tokens of the context, and layers with a state hold its last state.
Whatever is read after the context goes on from there in every copy, as it does in an engine.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from transformers import DynamicCache

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch


def copy_of(
    cache: Any, scored: Sequence[int], positions: list[int] | slice = slice(None), batch: int = 1
) -> DynamicCache:
    """A cache that a pass can change while the one it comes from stays as it is.

    Args:
        cache: of one context.
        scored: indices of the layers that are scored.
        positions: tokens of the context that those layers see.
        batch: how many texts go on from the context.
    """
    made: DynamicCache = copy.copy(cache)
    made.layers = []
    for index, layer in enumerate(cache.layers):
        if index in scored:
            own = DynamicCache()
            keys, values = layer.keys[:, :, positions], layer.values[:, :, positions]
            own.update(_repeat(keys, batch), _repeat(values, batch), 0)
            made.layers += own.layers
        elif hasattr(layer, "recurrent_states"):
            made.layers.append(_copy_states(layer, batch))
        else:
            window = copy.copy(layer)
            window.keys, window.values = (_repeat(h, batch) for h in (layer.keys, layer.values))
            made.layers.append(window)
    return made


def layers_of(
    cache: Any, scored: Sequence[int] | None = None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of each scored layer of a cache that holds one context, ``[H, T, D]``.

    Args:
        cache: of one context.
        scored: indices of the layers that are scored; None: all.
    """
    layers = cache.layers if scored is None else [cache.layers[index] for index in scored]
    return [(layer.keys[0], layer.values[0]) for layer in layers]


def _repeat(tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """``[1, ...]`` for each of some texts."""
    return tensor.expand(batch, *tensor.shape[1:])


def _copy_states(layer: Any, batch: int) -> Any:
    made = copy.copy(layer)
    for name in ("conv_states", "recurrent_states"):
        states: dict[int, torch.Tensor | None] = getattr(layer, name)
        own = {n: None if s is None else _repeat(s, batch).clone() for n, s in states.items()}
        setattr(made, name, own)
    made.update_recurrent_state = partial(_replace_state, made)
    return made


def _replace_state(
    layer: Any, recurrent_states: torch.Tensor, state_idx: int = 0, **_: Any
) -> torch.Tensor:
    """Instead of writing over the state before, which a backward pass needs."""
    layer.recurrent_states[state_idx] = recurrent_states
    return recurrent_states
