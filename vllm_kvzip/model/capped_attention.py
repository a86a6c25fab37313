"""Attention whose logits pass through a cap, as Gemma 2's do; torch has no fused kernel for it."""

from __future__ import annotations

import torch

LOGITS_AT_ONCE = 2**22


def cap_logits_(logits: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """``soft_cap * tanh(logits / soft_cap)`` in their place; nothing if the cap is None or 0."""
    return logits.div_(soft_cap).tanh_().mul_(soft_cap) if soft_cap else logits


def attend_with_cap(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    soft_cap: float,
    *,
    causal: bool,
    offsets: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over capped logits, some rows at a time, in float32.

    Arguments and result as those of :func:`~.fused_attention.attend_with_normaliser`; ``soft_cap``
    is not 0.
    """
    columns, values = keys.float().transpose(1, 2), values.float()
    attended = torch.empty_like(queries)
    log_normaliser = queries.new_empty(queries.shape[:2], dtype=torch.float32)
    num_heads, num_keys, _ = keys.shape
    step = max(1, LOGITS_AT_ONCE // (num_heads * num_keys))
    for first in range(0, queries.shape[1], step):
        rows = slice(first, first + step)
        logits = torch.bmm(queries[:, rows].float(), columns)
        if offsets is not None:
            logits += offsets[:, rows, None]
        logits = cap_logits_(logits.mul_(scale), soft_cap)
        if causal:
            row = torch.arange(first, first + logits.shape[1], device=keys.device)
            future = torch.arange(num_keys, device=keys.device) > row[:, None]
            logits.masked_fill_(future, float("-inf"))
        log_normaliser[:, rows] = logits.logsumexp(dim=2)
        weights = logits.sub_(log_normaliser[:, rows, None]).exp_()
        attended[:, rows] = torch.bmm(weights, values).to(attended.dtype)
    return attended, log_normaliser
