"""How many head pages may each head keep?

The total is fixed before any score is known (it follows from the prompt's length), so every budget
only moves pages between heads. All functions return int64 ``[L, H]`` with exactly that sum.
"""

from __future__ import annotations

import torch


def allocate_uniform(total_pages: int, num_layers: int, num_kv_heads: int) -> torch.Tensor:
    """The same budget for every head.

    Raises:
        ValueError: if the pages cannot be shared out evenly.
    """
    share, rest = divmod(total_pages, num_layers * num_kv_heads)
    if rest:
        raise ValueError(
            f"{total_pages} pages do not divide over {num_layers}x{num_kv_heads} heads"
        )
    return torch.full((num_layers, num_kv_heads), share, dtype=torch.int64)


def allocate_adaptive(
    scores: torch.Tensor,
    total_pages: int,
    block_size: int,
    min_pages: int,
    *,
    per_layer: bool = False,
) -> torch.Tensor:
    """One ranking of head pages over all layers and heads (KVzip's non-uniform budgets).

    A head's j-th page holds its tokens of rank ``j * N`` to ``(j + 1) * N``, and is worth their
    mean score. Those means fall with j, so taking the best pages overall gives each head a prefix
    of its own ranking.

    Args:
        scores: float32 ``[L, H, T]``, finite, T a multiple of the block size.
        total_pages: pages to hand out.
        block_size: tokens per page.
        min_pages: floor of every head.
        per_layer: rank inside each layer, for comparison; needs ``total_pages`` divisible by L.

    Raises:
        ValueError: if the floors exceed the total, or the total exceeds the pages there are.
    """
    num_layers, num_heads, num_tokens = scores.shape
    num_pages = num_tokens // block_size
    _check_total(total_pages, num_layers * num_heads, min_pages, num_pages)
    ranked = scores.sort(dim=-1, descending=True).values
    worth = ranked.view(num_layers, num_heads, num_pages, block_size).mean(dim=-1)
    contested = worth[:, :, min_pages:]
    pages = torch.full((num_layers, num_heads), min_pages, dtype=torch.int64)
    spare = total_pages - num_layers * num_heads * min_pages
    if per_layer:
        if total_pages % num_layers:
            raise ValueError(f"{total_pages} pages do not divide over {num_layers} layers")
        return pages + _best_counts(contested.flatten(1), spare // num_layers, contested.shape)
    return pages + _best_counts(contested.reshape(1, -1), spare, contested.shape)


def allocate_from_fractions(
    fractions: torch.Tensor, total_pages: int, min_pages: int, max_pages: int
) -> torch.Tensor:
    """Share pages out in proportion to fixed fractions, by largest remainder.

    Heads are scaled by one common factor so that the clamped shares add up to the total.

    Args:
        fractions: float ``[L, H]``, non-negative, share of its KV pairs each head should keep.
        total_pages: pages to hand out.
        min_pages: floor of every head.
        max_pages: what a head has at most.

    Raises:
        ValueError: if the floors exceed the total, or the total exceeds the pages there are.
    """
    _check_total(total_pages, fractions.numel(), min_pages, max_pages)
    wanted = fractions.to(torch.float64).flatten().clamp_min(1e-6) * max_pages
    low, high = 0.0, float(max_pages / wanted.min())
    for _ in range(100):  # bisection: the clamped sum grows with the factor
        middle = (low + high) / 2
        if (wanted * middle).clamp(min_pages, max_pages).sum() < total_pages:
            low = middle
        else:
            high = middle
    shares = (wanted * high).clamp(min_pages, max_pages)
    pages = (shares + 1e-9).floor().clamp(min_pages, max_pages).to(torch.int64)
    missing = total_pages - int(pages.sum())
    remainder = shares - pages
    step = 1 if missing > 0 else -1
    while missing:
        room = pages < max_pages if step > 0 else pages > min_pages
        order = torch.where(room, remainder * step, float("-inf")).argsort(
            descending=True, stable=True
        )
        count = min(abs(missing), int(room.sum()))
        pages[order[:count]] += step
        missing -= step * count
    return pages.view(fractions.shape)


def _best_counts(worth: torch.Tensor, count: int, shape: torch.Size) -> torch.Tensor:
    """How many of the ``count`` best entries of each row fall to each head."""
    order = worth.argsort(dim=-1, descending=True, stable=True)[:, :count]
    taken = torch.zeros(worth.shape, dtype=torch.int64)
    taken.scatter_(1, order, 1)
    return taken.view(shape).sum(dim=-1)


def _check_total(total_pages: int, num_heads: int, min_pages: int, max_pages: int) -> None:
    low, high = num_heads * min_pages, num_heads * max_pages
    if not low <= total_pages <= high:
        raise ValueError(f"{total_pages} pages asked for, but the heads hold {low} to {high}")
