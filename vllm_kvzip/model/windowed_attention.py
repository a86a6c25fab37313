"""Attention within a sliding window; torch has no fused kernel that gives only these products."""

from __future__ import annotations

import torch

from vllm_kvzip.model.capped_attention import cap_logits_

ROWS_AT_ONCE = 256
LOGITS_AT_ONCE = 2**24


def attend_within_window(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int,
    *,
    soft_cap: float | None = None,
    sink_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention of each query to its own token and some tokens before it, in float32.

    Args:
        queries: ``[H * G, M, D]``, of the last M tokens; the queries of a group share a head.
        keys, values: ``[H, K, D]``, of all tokens.
        scale: softmax scale.
        window: how many tokens a query sees, its own among them.
        soft_cap: scaled logits become ``soft_cap * tanh(logits / soft_cap)``; None or 0: they stay.
        sink_logits: float32 ``[H * G, 1]``, a logit of each query head that joins its softmax and
            has no value.

    Returns:
        ``[H * G, M, D]``, like the queries.
    """
    attended = torch.empty_like(queries)
    num_members, num_rows, _ = queries.shape
    num_heads, num_keys, _ = keys.shape
    before = num_keys - num_rows
    widest = num_members * min(num_keys, window + ROWS_AT_ONCE)
    step = max(1, min(ROWS_AT_ONCE, LOGITS_AT_ONCE // widest))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        seen = slice(max(0, before + first - window + 1), before + last)
        rows = queries[:, first:last].float().reshape(num_heads, -1, queries.shape[2])
        logits = torch.bmm(rows, keys[:, seen].float().transpose(1, 2))
        logits = cap_logits_(logits.mul_(scale), soft_cap).view(num_members, last - first, -1)
        row = torch.arange(before + first, before + last, device=keys.device)[:, None]
        distance = row - torch.arange(seen.start, seen.stop, device=keys.device)
        logits.masked_fill_((distance < 0) | (distance >= window), float("-inf"))
        log_normaliser = logits.logsumexp(dim=2)
        if sink_logits is not None:
            log_normaliser = log_normaliser.logaddexp(sink_logits)
        weights = logits.sub_(log_normaliser[..., None]).exp_()
        found = torch.bmm(weights.view(num_heads, -1, weights.shape[2]), values[:, seen].float())
        attended[:, first:last] = found.view(num_members, last - first, -1).to(attended.dtype)
    return attended
