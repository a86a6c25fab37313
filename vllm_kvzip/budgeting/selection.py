"""Scores and budgets to a keep plan: which KV pairs each head keeps."""

from __future__ import annotations

import torch

from vllm_kvzip.core import KeepPlan, QuantizedKeepPlan


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


def rank(scores: torch.Tensor, num_sinks: int, num_recent: int) -> torch.Tensor:
    """Each head's tokens from the best to the worst; protected ones first, ties to the earlier.

    Args:
        scores: float32 ``[L, H, T]``.
        num_sinks, num_recent: protected tokens at either end.

    Returns:
        int64 ``[L * H, T]``.
    """
    num_tokens = scores.shape[-1]
    ranked = scores.reshape(-1, num_tokens).clone()
    ranked[:, :num_sinks] = float("inf")
    if num_recent:
        ranked[:, num_tokens - num_recent :] = float("inf")
    return ranked.argsort(dim=-1, descending=True, stable=True)


def select(
    scores: torch.Tensor,
    pages: torch.Tensor,
    block_size: int,
    num_sinks: int,
    num_recent: int,
    total_pages: int | None = None,
) -> KeepPlan:
    """Per head, the best tokens that fill its pages; protected tokens first, ties to the earlier.

    Args:
        scores: float32 ``[L, H, T]``.
        pages: int64 ``[L, H]``, head pages of each head, on the device of ``scores``.
        block_size: tokens per page.
        num_sinks, num_recent: protected tokens at either end; must fit every head's budget.
        total_pages: sum of ``pages``, for a caller who knows it: nothing is read back then from a
            device other than the CPU, and nothing checked there.

    Raises:
        ValueError: if a score is NaN, a head has no page, or more pages than tokens.
    """
    budgets = (pages * block_size).flatten()
    if total_pages is None or scores.device.type == "cpu":
        _check(scores, budgets, num_sinks + num_recent)
    order = rank(scores, num_sinks, num_recent)
    return take_best(order, pages, block_size, total_pages)


def take_best(
    order: torch.Tensor, pages: torch.Tensor, block_size: int, total_pages: int | None = None
) -> KeepPlan:
    """Per head, the first tokens of an order that fill its pages.

    Args:
        order: int64 ``[L * H, T]``, of :func:`rank`.
        pages, block_size, total_pages: see :func:`select`.
    """
    budgets = (pages * block_size).flatten()
    tokens = torch.arange(order.shape[1], device=order.device)
    kept = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    kept.scatter_(1, order, tokens < budgets[:, None])
    offsets = torch.zeros(len(budgets) + 1, dtype=torch.int64, device=order.device)
    torch.cumsum(budgets, 0, out=offsets[1:])
    total = block_size * (int(pages.sum()) if total_pages is None else total_pages)
    return KeepPlan(positions=_positions(kept, total), offsets=offsets, pages=pages)


def take_behind(
    order: torch.Tensor,
    taken: torch.Tensor,
    pages: torch.Tensor,
    page_tokens: int,
    total_pages: int,
) -> QuantizedKeepPlan:
    """Per head, the tokens of an order that fill its quantized pages, behind those placed already.

    Args:
        order: int64 ``[L * H, T]``, of :func:`rank`.
        taken: int64 ``[L, H]``, how many of each head's tokens are placed.
        pages: int64 ``[L, H]``, quantized pages of each head; may hold more than is left.
        page_tokens: Q.
        total_pages: sum of ``pages``.
    """
    rows, num_tokens = order.shape
    first = taken.reshape(-1, 1)
    ranks = torch.arange(num_tokens, device=order.device)
    chosen = (ranks >= first) & (ranks < first + pages.reshape(-1, 1) * page_tokens)
    kept = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    kept.scatter_(1, order, chosen)
    ends = (pages.flatten() * page_tokens).cumsum(0)
    starts = ends - pages.flatten() * page_tokens  # of each head's tokens in the plan
    total = total_pages * page_tokens
    place = starts[:, None] + kept.cumsum(dim=1) - 1
    place = torch.where(kept, place, total).flatten()  # what is not kept goes behind the end
    columns = ranks.expand(rows, num_tokens).flatten()
    positions = place.new_full((total + 1,), -1).scatter_(0, place, columns)[:total]
    return QuantizedKeepPlan(positions.view(total_pages, page_tokens), pages)


def _positions(kept: torch.Tensor, total: int) -> torch.Tensor:
    """Columns of what is kept, row after row; ``nonzero`` would wait for the device to count.

    Args:
        kept: bool ``[heads, T]``.
        total: how many.
    """
    place = kept.flatten().cumsum(0) - 1
    place = torch.where(kept.flatten(), place, total)  # what is not kept goes behind the end
    columns = torch.arange(kept.shape[1], device=kept.device).expand(kept.shape).flatten()
    return place.new_empty(total + 1).scatter_(0, place, columns)[:total]


def _check(scores: torch.Tensor, budgets: torch.Tensor, num_protected: int) -> None:
    num_tokens = scores.shape[-1]
    if torch.isnan(scores).any():
        raise ValueError("a scorer returned NaN")
    least, most = int(budgets.min()), int(budgets.max())
    if least < max(1, num_protected) or most > num_tokens:
        raise ValueError(
            f"head budgets of {least} to {most} tokens do not fit "
            f"{num_protected} protected of {num_tokens} tokens"
        )
