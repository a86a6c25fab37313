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
    ranked: torch.Tensor,
    total_pages: int,
    block_size: int,
    min_pages: int | torch.Tensor,
    *,
    max_pages: torch.Tensor | None = None,
    per_layer: bool = False,
) -> torch.Tensor:
    """One ranking of head pages over all layers and heads (KVzip's non-uniform budgets).

    A head's j-th page holds its tokens of rank ``j * N`` to ``(j + 1) * N``, and is worth their
    mean score. Those means fall with j, so taking the best pages overall gives each head a prefix
    of its own ranking.

    Args:
        ranked: float32 ``[L, H, T]``, each head's scores from the best to the worst, T a multiple
            of the block size; finite, or minus infinity where a head has nothing.
        total_pages: pages to hand out.
        block_size: tokens per page.
        min_pages: floor of every head, or int64 ``[L, H]`` of each.
        max_pages: int64 ``[L, H]``, pages each head has; None: all T tokens.
        per_layer: rank inside each layer, so that every layer gets the same; for comparison. Needs
            ``total_pages`` divisible by L.

    Raises:
        ValueError: if the floors exceed the total, or the total exceeds the pages there are.
    """
    num_layers, num_heads, num_tokens = ranked.shape
    num_pages = num_tokens // block_size
    num_all = num_layers * num_heads
    most = num_all * num_pages if max_pages is None else int(max_pages.sum())
    floors = num_all * min_pages if isinstance(min_pages, int) else int(min_pages.sum())
    _check_total(total_pages, floors, most)
    if not isinstance(min_pages, int):
        min_pages = min_pages[..., None]
    worth = ranked.view(num_layers, num_heads, num_pages, block_size).mean(dim=-1)
    return _best_pages(worth, total_pages, min_pages, per_layer=per_layer)


def allocate_remaining(
    ranked: torch.Tensor,
    taken: torch.Tensor,
    total_pages: int,
    page_tokens: int,
    min_pages: torch.Tensor,
    *,
    per_layer: bool = False,
) -> torch.Tensor:
    """As :func:`allocate_adaptive`, of the tokens that no earlier tier has taken.

    A page is worth the scores of its tokens. Where a head's last tokens do not fill a page it is
    worth less, and a page of no token is given only when there is nothing else.

    Args:
        ranked: float32 ``[L, H, T]``, each head's scores from the best to the worst, finite.
        taken: int64 ``[L, H]``, how many of a head's best tokens earlier tiers have.
        total_pages: pages to hand out.
        page_tokens: tokens of a page.
        min_pages: int64 ``[L, H]``, floor of each head; the total must cover them, in each layer
            with ``per_layer``.
        per_layer: rank inside each layer; needs ``total_pages`` divisible by L.

    Raises:
        ValueError: if the floors exceed the total (seen on the CPU, where nothing waits for it).
    """
    num_layers, num_heads, num_tokens = ranked.shape
    num_pages = max(-(-num_tokens // page_tokens), -(-total_pages // (num_layers * num_heads)))
    floors = int(min_pages.sum()) if min_pages.device.type == "cpu" else 0
    _check_total(total_pages, floors, num_layers * num_heads * num_pages)
    ends = torch.zeros(num_layers, num_heads, num_tokens + 1, dtype=torch.float64)
    ends = ends.to(ranked.device)
    torch.cumsum(ranked, -1, dtype=torch.float64, out=ends[..., 1:])
    ranks = taken[..., None] + page_tokens * torch.arange(num_pages + 1, device=ranked.device)
    bounds = ends.gather(2, ranks.clamp(max=num_tokens))
    worth = bounds.diff(dim=-1)
    worth = torch.where(ranks[..., :-1] < num_tokens, worth, -torch.inf)
    return _best_pages(worth, total_pages, min_pages[..., None], per_layer=per_layer)


def allocate_at_most(
    ranked: torch.Tensor,
    total_pages: int,
    page_tokens: int,
    min_pages: torch.Tensor,
    max_pages: torch.Tensor,
    *,
    per_layer: bool = False,
) -> torch.Tensor:
    """As :func:`allocate_remaining`; pages are left over where heads have too few tokens for them.

    So the sum may be smaller than the total.

    Args:
        ranked: float32 ``[L, H, T]``, each head's scores from the best to the worst; minus infinity
            where a head has no more tokens.
        total_pages: pages to hand out, at most.
        page_tokens: tokens of a page.
        min_pages, max_pages: int64 ``[L, H]``, bounds of each head.
        per_layer: rank inside each layer; needs ``total_pages`` divisible by L.
    """
    num_layers, num_heads, num_tokens = ranked.shape
    num_pages = max(-(-num_tokens // page_tokens), -(-total_pages // (num_layers * num_heads)))
    padded = ranked.new_zeros(num_layers, num_heads, num_pages * page_tokens)
    padded[..., :num_tokens] = ranked.masked_fill(ranked == float("-inf"), 0.0)
    worth = padded.double().unflatten(2, (num_pages, page_tokens)).sum(dim=-1)
    there = torch.arange(num_pages, device=ranked.device) < max_pages[..., None]
    worth = worth.masked_fill(~there, -torch.inf)
    pages = _best_pages(worth, total_pages, min_pages[..., None], per_layer=per_layer)
    return pages.minimum(max_pages)


def allocate_from_fractions(
    fractions: torch.Tensor,
    importance: torch.Tensor,
    total_pages: int,
    min_pages: int | torch.Tensor,
    num_pages: float,
    max_pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """Give each head the share a profile says; the least important heads pay for what is missing.

    Every head has a floor, and pages are whole, so the shares seldom add up to the total. Scaling
    all of them would take a little from every retrieval head, and a retrieval head that misses a
    few tokens fails on just those. So what is missing is taken from the least important heads, down
    to their floor, and what is over goes to the most important ones.

    Args:
        fractions: float ``[L, H]``, in [0, 1], share of its KV pairs each head should keep.
        importance: float ``[L, H]``, order in which heads give and take; ties by position.
        total_pages: pages to hand out.
        min_pages: floor of every head, or int64 ``[L, H]`` of each.
        num_pages: pages of a head before compression, of which it gets a share; not whole where a
            head's tokens fill its last page in part.
        max_pages: int64 ``[L, H]``, what each head has; None: ``num_pages``, whole.

    Raises:
        ValueError: if the floors exceed the total, or the total exceeds the pages there are.
    """
    most = (
        torch.full_like(fractions, int(num_pages), dtype=torch.int64)
        if max_pages is None
        else max_pages
    )
    most = most.flatten()
    least = torch.as_tensor(min_pages).expand(fractions.shape).flatten()
    _check_total(total_pages, int(least.sum()), int(most.sum()))
    wanted = fractions.to(torch.float64).flatten() * num_pages
    pages = wanted.round().to(torch.int64).maximum(least).minimum(most)
    missing = total_pages - int(pages.sum())
    order = importance.flatten().argsort(descending=missing > 0, stable=True)
    ranked = pages[order]
    room = most[order] - ranked if missing > 0 else ranked - least[order]
    change = (abs(missing) - (room.cumsum(0) - room)).clamp_min(0).minimum(room)
    pages[order] = ranked + change if missing > 0 else ranked - change
    return pages.view(fractions.shape)


def with_floors(worth: torch.Tensor, min_pages: int | torch.Tensor) -> torch.Tensor:
    """Worth of pages, ``[L, H, pages]``, where those of every head's floor come before all others.

    Args:
        worth: ``[L, H, pages]``, falling along a head's pages.
        min_pages: floor of every head, or int64 ``[L, H, 1]`` of each.
    """
    on_floor = torch.arange(worth.shape[2], device=worth.device) < min_pages
    return worth.masked_fill(on_floor, torch.inf)


def _best_pages(
    worth: torch.Tensor, total_pages: int, min_pages: int | torch.Tensor, *, per_layer: bool
) -> torch.Tensor:
    """The floor of every head, and the best pages above it.

    Args:
        worth: ``[L, H, pages]``, falling along a head's pages.
        min_pages: floor of every head, or int64 ``[L, H, 1]`` of each.
        total_pages, per_layer: see :func:`allocate_adaptive`.
    """
    num_layers = len(worth)
    worth = with_floors(worth, min_pages)
    if per_layer:
        if total_pages % num_layers:
            raise ValueError(f"{total_pages} pages do not divide over {num_layers} layers")
        return _best_counts(worth.flatten(1), total_pages // num_layers, worth.shape)
    return _best_counts(worth.reshape(1, -1), total_pages, worth.shape)


def _best_counts(worth: torch.Tensor, count: int, shape: torch.Size) -> torch.Tensor:
    """How many of the ``count`` best entries of each row fall to each head."""
    order = worth.argsort(dim=-1, descending=True, stable=True)[:, :count]
    taken = torch.zeros(worth.shape, dtype=torch.int64, device=worth.device)
    taken.scatter_(1, order, 1)
    return taken.view(shape).sum(dim=-1)


def _check_total(total_pages: int, low: int, high: int) -> None:
    if not low <= total_pages <= high:
        raise ValueError(f"{total_pages} pages asked for, but the heads hold {low} to {high}")
