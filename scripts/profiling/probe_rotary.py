"""How a transformers model rotates the keys of the layers that are scored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.model.transformers_rotary import transformers_tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.model.rotary import RotaryTables

TRIED_POSITIONS = 16
TRIED_TOKEN = 5
TOLERANCE = 1e-3


def rotary_of(
    model: Any, num_tokens: int, scored: Sequence[int] | None = None
) -> RotaryTables | None:
    """The rotary angles of a transformers model, for its first positions; None if it has none.

    Some models rotate in layers with a sliding window only, or by other angles there. So the model
    reads one token at some positions, and the keys of a scored layer show what is done to them.

    Args:
        model: of transformers.
        num_tokens: how many positions.
        scored: indices of the layers that are scored, where others are not; None: all are.

    Raises:
        ProfileError: if it is not understood how keys are rotated.
    """
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    if embedding is None:
        return None
    kinds = getattr(model.config.get_text_config(), "layer_types", None)
    kind = kinds[scored[0]] if scored and kinds else "full_attention"
    tables = transformers_tables(embedding, num_tokens, kind)
    if scored and len(scored) < model.config.get_text_config().num_hidden_layers:
        positions = torch.arange(TRIED_POSITIONS)
        keys = _keys_at(model, scored[0], positions)
        if _are_alike(keys):
            return None
        if tables is not None and not _are_alike(tables.unrotate(keys, positions)):
            tables = None
    if tables is None:
        raise ProfileError(
            f"How {type(model).__name__} rotates its keys is not understood; add --no-surrogate."
        )
    return tables


@torch.inference_mode()
def _keys_at(model: Any, layer: int, positions: torch.Tensor) -> torch.Tensor:
    """Keys of one token, alone, at each position, ``[H, positions, D]``."""
    ids = torch.full((len(positions), 1), TRIED_TOKEN)
    cache = model(ids, position_ids=positions[:, None], use_cache=True).past_key_values
    keys: torch.Tensor = cache.layers[layer].keys[:, :, 0]
    return keys.transpose(0, 1)


def _are_alike(keys: torch.Tensor) -> bool:
    """Whether a head's keys ``[H, positions, D]`` are the same at all positions."""
    return float((keys - keys[:, :1]).norm()) < TOLERANCE * float(keys.norm())
