"""What two tiers keep in a later compression, where earlier pairs of both tiers compete.

Pairs that are not quantized yet compete for the full tier; what does not get into it competes with
the quantized pairs of before for the quantized tier, and the rest is dropped. A quantized pair
never returns to the full tier, where it would take the bytes of an exact one.

Sink tokens keep a score of plus infinity from their first compression on, so that they are known in
whatever tier a head has them. In the full tier they stay: each head has pages for them there.

Attention knows from lengths how many tokens are in a head's quantized pages: they are full, but
where the head keeps everything (``storage/tiered_attention.py``). So a head that has dropped
something leaves a last page that it cannot fill, and some of the last pages may stay unused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.budgeting.candidates import of_kept, with_earlier
from vllm_kvzip.budgeting.selection import check_budgets, rank_protected, take
from vllm_kvzip.core import EarlierPages

if TYPE_CHECKING:
    from vllm_kvzip.budgeting.allocation import PageAllocator
    from vllm_kvzip.core import CompressedPrefix, KeepPlan, PrefixPlan


@dataclass(frozen=True)
class TieredCandidates:
    """What competes; ``w`` and ``n`` are the most pages of a head, and absent pages are padded.

    Attributes:
        quantized_pages: int64 ``[L, H, w]``, quantized pages of before.
        quantized_scores: float32 ``[L, H, w * Q]``; minus infinity where there is no token.
        pages: int64 ``[L, H, n]``, head pages of pairs as they are: those of before, and new ones.
        scores: float32 ``[L, H, n * N]``, likewise.
        available: int64 ``[L, H]``, how many of these pages each head has.
    """

    quantized_pages: torch.Tensor
    quantized_scores: torch.Tensor
    pages: torch.Tensor
    scores: torch.Tensor
    available: torch.Tensor

    @classmethod
    def of(
        cls,
        earlier: CompressedPrefix,
        sources: torch.Tensor,
        scores: torch.Tensor,
        page_tokens: int,
    ) -> TieredCandidates:
        """What an earlier compression kept, and what is new.

        Args:
            earlier: with scores of both tiers.
            sources: int64 ``[L, H, n]``, pages of the new blocks.
            scores: float32 ``[L, H, n * N]``.
            page_tokens: N.
        """
        available = earlier.pages + sources.shape[2]
        pages, scores = with_earlier(earlier, sources, scores, page_tokens)
        if (tier := earlier.quantized) is None:
            shape = (*sources.shape[:2], 0)
            return cls(sources.new_zeros(shape), scores.new_zeros(shape), pages, scores, available)
        assert earlier.quantized_scores is not None
        width = int(tier.pages.max())
        filled = torch.arange(width, device=pages.device) < tier.pages[..., None]
        ids = tier.page_ids.new_zeros(filled.shape)
        ids[filled] = tier.page_ids
        by_page = earlier.quantized_scores.view(len(tier.page_ids), -1)
        of_pages = scores.new_full((*filled.shape, by_page.shape[1]), float("-inf"))
        of_pages[filled] = by_page
        return cls(ids, of_pages.flatten(2), pages, scores, available)


def mark_sinks(scores: torch.Tensor, num_sinks: int) -> torch.Tensor:
    """Scores of a first compression as later ones shall know them, float32 ``[L, H, T]``.

    Args:
        scores: float32 ``[L, H, T]``.
        num_sinks: first tokens, which every head keeps.
    """
    scores = scores.clone()
    scores[:, :, :num_sinks] = float("inf")
    return scores


def choose(
    candidates: TieredCandidates,
    plan: PrefixPlan,
    num_new_tokens: int,
    allocator: PageAllocator,
) -> tuple[list[KeepPlan], list[torch.Tensor], EarlierPages]:
    """What each head keeps, tier by tier.

    Positions of the full tier count the tokens of ``candidates.pages``; those of the quantized tier
    count the tokens of ``candidates.quantized_pages`` and then them.

    Args:
        candidates: what competes.
        plan: of the compression.
        num_new_tokens: tokens of a head that came since the last one.
        allocator: shares out pages.

    Returns:
        a plan for each tier, the scores of what it keeps, and the quantized pages of before.

    Raises:
        ValueError: if a head would lose protected tokens (seen on the CPU).
    """
    scores = candidates.scores
    num_recent = min(plan.num_recent_tokens, num_new_tokens)
    protected = scores == float("inf")
    if num_recent:
        protected[..., -num_recent:] = True
    tier = plan.tiers[0]
    ranking = rank_protected(scores, protected)
    pages = allocator.full(ranking, plan, candidates.available).to(scores.device)
    none = torch.zeros_like(pages)
    total = tier.num_pages * pages.numel()
    keeps = [take(ranking, none, pages, tier.page_tokens, total)]
    found = [of_kept(scores, keeps[0])]
    full_tokens = kept_tokens = pages * tier.page_tokens
    by_layer: list[int] = []
    if len(plan.tiers) > 1:
        tier = plan.tiers[1]
        ranks = torch.arange(scores.shape[2], device=scores.device)
        taken = torch.zeros_like(protected)
        taken.scatter_(2, ranking.order, ranks < full_tokens[..., None])
        left = torch.cat(
            [candidates.quantized_scores, scores.masked_fill(taken, float("-inf"))], dim=2
        )
        protected = torch.cat(
            [candidates.quantized_scores == float("inf"), protected & ~taken], dim=2
        )
        counts = (left > float("-inf")).sum(dim=2)
        size = tier.page_tokens
        whole = counts + full_tokens == plan.boundary_tokens
        most = torch.where(whole, (counts + size - 1) // size, counts // size)
        least = ((protected.sum(dim=2) + size - 1) // size).minimum(most)
        ranking = rank_protected(left, protected)
        pages = allocator.quantized_later(ranking, full_tokens, plan, least, most)
        pages = pages.to(scores.device)
        by_layer = pages.sum(dim=1).tolist()
        keeps.append(take(ranking, none, pages, size, sum(by_layer), counts))
        found.append(of_kept(left, keeps[1]))
        kept_tokens = full_tokens + counts.minimum(pages * size)
    if scores.device.type == "cpu":
        num_protected = plan.num_sink_tokens + num_recent
        check_budgets(full_tokens, kept_tokens, num_protected, plan.boundary_tokens)
    return keeps, found, EarlierPages(candidates.quantized_pages, tuple(by_layer))
