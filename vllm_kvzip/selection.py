"""Scores and budgets to a keep plan: which KV pairs each head keeps."""

from __future__ import annotations

import torch

from vllm_kvzip.core import KeepPlan


def protect(scores: torch.Tensor, num_sinks: int, num_recent: int) -> torch.Tensor:
    """Scores in which the protected tokens of every head rank first.

    They get the head's own best score, so that page means stay comparable between heads; ties are
    broken in :func:`select`, which ranks protected tokens above all others.

    Args:
        scores: float32 ``[L, H, T]``.
        num_sinks: first tokens to protect.
        num_recent: last tokens to protect.
    """
    best = scores.amax(dim=-1, keepdim=True)
    protected = scores.clone()
    protected[:, :, :num_sinks] = best
    if num_recent:
        protected[:, :, -num_recent:] = best
    return protected


def select(
    scores: torch.Tensor, pages: torch.Tensor, block_size: int, num_sinks: int, num_recent: int
) -> KeepPlan:
    """Per head, the best tokens that fill its pages; protected tokens first, ties to the earlier.

    Args:
        scores: float32 ``[L, H, T]``.
        pages: int64 ``[L, H]``, head pages of each head.
        block_size: tokens per page.
        num_sinks, num_recent: protected tokens at either end; must fit every head's budget.

    Raises:
        ValueError: if a score is NaN, a head has no page, or more pages than tokens.
    """
    num_tokens = scores.shape[-1]
    if torch.isnan(scores).any():
        raise ValueError("a scorer returned NaN")
    budgets = (pages * block_size).flatten()
    if int(budgets.min()) < max(1, num_sinks + num_recent) or int(budgets.max()) > num_tokens:
        raise ValueError(
            f"head budgets of {int(budgets.min())} to {int(budgets.max())} tokens do not fit "
            f"{num_sinks + num_recent} protected of {num_tokens} tokens"
        )
    ranked = scores.reshape(-1, num_tokens).clone()
    ranked[:, :num_sinks] = float("inf")
    if num_recent:
        ranked[:, num_tokens - num_recent :] = float("inf")
    order = ranked.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros(ranked.shape, dtype=torch.bool, device=scores.device)
    kept.scatter_(1, order, torch.arange(num_tokens) < budgets[:, None])
    offsets = torch.zeros(len(budgets) + 1, dtype=torch.int64)
    torch.cumsum(budgets, 0, out=offsets[1:])
    return KeepPlan(positions=kept.nonzero()[:, 1], offsets=offsets, pages=pages)
