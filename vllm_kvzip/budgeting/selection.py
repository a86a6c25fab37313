"""Scores and budgets to a keep plan: which KV pairs each head keeps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvzip.core import KeepPlan


def protect(scores: torch.Tensor, num_sinks: int, num_recent: int) -> torch.Tensor:
    """Scores in which the protected tokens of every head rank first.

    They get the head's own best score, so that page means stay comparable between heads;
    :func:`rank` breaks ties, and ranks protected tokens above all others.

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


@dataclass(frozen=True)
class Ranking:
    """Each head's tokens from the best to the worst; protected ones first, ties to the earlier.

    Attributes:
        order: int64 ``[L, H, T]``.
        scores: float32 ``[L, H, T]``, of :func:`protect`, in that order.
    """

    order: torch.Tensor
    scores: torch.Tensor


def rank(scores: torch.Tensor, num_sinks: int, num_recent: int) -> Ranking:
    """Rank the tokens of every head.

    Args:
        scores: float32 ``[L, H, T]``.
        num_sinks, num_recent: protected tokens at either end.
    """
    keys = scores.clone()
    keys[:, :, :num_sinks] = float("inf")
    if num_recent:
        keys[:, :, -num_recent:] = float("inf")
    order = keys.argsort(dim=-1, descending=True, stable=True)
    return Ranking(order, protect(scores, num_sinks, num_recent).gather(2, order))


def first_and_last(scores: torch.Tensor, num_sinks: int, num_recent: int) -> torch.Tensor:
    """The first and last tokens of each head, bool ``[L, H, T]``, for :func:`rank_protected`.

    What an earlier round kept has pads behind it, and its last tokens may be among the last ones.

    Args:
        scores: float32 ``[L, H, T]``, minus infinity for pads.
        num_sinks, num_recent: protected tokens at either end.
    """
    real = scores > float("-inf")
    from_end = real.flip(-1).cumsum(-1).flip(-1)
    protected = from_end <= num_recent
    protected[:, :, :num_sinks] = True
    return protected & real


def rank_protected(scores: torch.Tensor, protected: torch.Tensor) -> Ranking:
    """As :func:`rank`, where the protected tokens of each head are told.

    Args:
        scores: float32 ``[L, H, T]``; plus infinity for some protected tokens, and minus infinity
            where a head has no token.
        protected: bool ``[L, H, T]``.
    """
    order = scores.masked_fill(protected, float("inf")).argsort(
        dim=-1, descending=True, stable=True
    )
    best = scores.masked_fill(scores == float("inf"), float("-inf")).amax(dim=-1, keepdim=True)
    return Ranking(order, torch.where(protected, best, scores).gather(2, order))


def select(
    scores: torch.Tensor, pages: torch.Tensor, block_size: int, num_sinks: int, num_recent: int
) -> KeepPlan:
    """One tier: per head, the best tokens that fill its pages.

    Args:
        scores: float32 ``[L, H, T]``.
        pages: int64 ``[L, H]``, head pages of each head.
        block_size: tokens per page.
        num_sinks, num_recent: protected tokens at either end; must fit every head's budget.

    Raises:
        ValueError: if a score is NaN, a head has no page, or more pages than tokens.
    """
    if torch.isnan(scores).any():
        raise ValueError("a scorer returned NaN")
    tokens = pages * block_size
    check_budgets(tokens, tokens, num_sinks + num_recent, scores.shape[-1])
    ranking = rank(scores, num_sinks, num_recent)
    return take(ranking, torch.zeros_like(pages), pages, block_size, int(pages.sum()))


def take(
    ranking: Ranking,
    first_rank: torch.Tensor,
    pages: torch.Tensor,
    page_tokens: int,
    total_pages: int,
    available: torch.Tensor | None = None,
) -> KeepPlan:
    """Per head, the tokens of the following ranks that fill its pages.

    Args:
        ranking: of all tokens.
        first_rank: int64 ``[L, H]``, of each head the first rank that is free: how many tokens
            earlier tiers have.
        pages: int64 ``[L, H]``, pages of each head, on the device of ``ranking``; may hold more
            tokens than are left.
        page_tokens: of each page.
        total_pages: sum of ``pages``; it is not read back from a device.
        available: int64 ``[L, H]``, how many of a head's ranks are tokens; None: all.
    """
    order = ranking.order.flatten(0, 1)  # [L * H, T]
    rows, num_tokens = order.shape
    num_wanted = pages.reshape(-1, 1) * page_tokens
    first = first_rank.reshape(-1, 1)
    ranks = torch.arange(num_tokens, device=order.device)
    chosen = (ranks >= first) & (ranks < first + num_wanted)
    if available is not None:
        chosen &= ranks < available.reshape(-1, 1)
    kept = torch.zeros(order.shape, dtype=torch.bool, device=order.device)
    kept.scatter_(1, order, chosen)
    starts = num_wanted.cumsum(0) - num_wanted  # of each head's tokens in the plan
    total = total_pages * page_tokens
    # ``nonzero`` would wait for the device to count. Whatever is not kept goes to place ``total``,
    # which is cut off.
    place = torch.where(kept, starts + kept.cumsum(dim=1) - 1, total).flatten()
    tokens = ranks.expand(rows, num_tokens).flatten()
    positions = place.new_full((total + 1,), -1).scatter_(0, place, tokens)[:total]
    return KeepPlan(positions.view(total_pages, page_tokens), pages)


def check_budgets(
    full_tokens: torch.Tensor, all_tokens: torch.Tensor, num_protected: int, num_tokens: int
) -> None:
    """Refuse budgets that no tokens fill, or that leave out protected ones.

    Args:
        full_tokens: int64 ``[L, H]``, tokens that each head keeps as they are.
        all_tokens: int64 ``[L, H]``, tokens that each head keeps.
        num_protected: tokens that every head must keep.
        num_tokens: that there are.

    Raises:
        ValueError: if a head keeps no token, or a budget does not fit.
    """
    least, most = int(all_tokens.min()), int(full_tokens.max())
    if least < max(1, num_protected) or most > num_tokens:
        raise ValueError(
            f"head budgets of {least} to {most} tokens do not fit "
            f"{num_protected} protected of {num_tokens} tokens"
        )
