"""The rotary embedding of a model that runs by transformers' own code, as tables of angles."""

from __future__ import annotations

import sys
from typing import Any

import torch

from vllm_kvzip.model.rotary import RotaryTables

BY_LENGTH = ("dynamic", "longrope")
"""Kinds whose angles depend on the length of what is read."""
TRIED_POSITIONS = 16


def transformers_tables(
    embedding: Any, num_positions: int, layer_type: str = "full_attention"
) -> RotaryTables | None:
    """Angles of a rotary embedding in transformers' format.

    Which dimensions are turned together is not said anywhere, so the model's own function turns
    random numbers, and what turns them back is taken.

    Args:
        embedding: the module; gives cosines and sines ``[1, T, R]`` for positions ``[1, T]``.
        num_positions: T.
        layer_type: of the layers that are asked for, where a model has angles for each type.

    Returns:
        None where they depend on the length of what is read, or nothing turns the numbers back.
    """
    turn = getattr(sys.modules[type(embedding).__module__], "apply_rotary_pos_emb", None)
    kind = getattr(embedding, "rope_type", "default")
    kinds = kind if isinstance(kind, dict) else {layer_type: kind}
    if kinds.get(layer_type) in (None, *BY_LENGTH) or turn is None:
        return None
    device = next(embedding.buffers()).device
    positions = torch.arange(num_positions, device=device)
    of_type = (layer_type,) if isinstance(kind, dict) else ()
    cos, sin = embedding(torch.zeros(1, device=device), positions[None], *of_type)
    cos, sin = cos.float(), sin.float()
    tried, angles = positions[-TRIED_POSITIONS:], cos.shape[-1]
    for width, columns, interleaved in (
        (angles, slice(angles // 2), False),
        (angles, slice(angles // 2), True),
        (angles, slice(None, None, 2), True),
        (2 * angles, slice(None), False),
    ):
        plain = torch.randn(1, 1, len(tried), width, generator=torch.Generator().manual_seed(0))
        plain = plain.to(device)
        try:
            turned, _ = turn(plain, plain, cos[:, tried], sin[:, tried])
        except (TypeError, RuntimeError):  # a function of other arguments, or of another width
            continue
        tables = RotaryTables(cos[0, :, columns], sin[0, :, columns], interleaved)
        if torch.allclose(tables.unrotate(turned, tried), plain, atol=1e-4):
            return tables
    return None
