"""Which budget, with what it needs: pages of each tier for every head of one compression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_kvzip.budgeting import budgets
from vllm_kvzip.planning.tiers import EPSILON, pages_for

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_kvzip.budgeting.selection import Ranking
    from vllm_kvzip.config import Budget
    from vllm_kvzip.core import CacheGeometry, PrefixPlan, Tier

    Grid = Sequence[Sequence[float]]


class PageAllocator:
    """Deals the pages that a plan has to heads; every page of the reserved blocks is used.

    Args:
        geometry: shape of the compressed layers.
        budget: one of :data:`~vllm_kvzip.config.Budget`.
        head_fractions: keep ratio -> ``[L][H]``, share of its KV pairs each head keeps, for
            budgets ``profile`` and ``retrieval``.
        head_importance: ``[L][H]``, which heads come first; likewise.
        tier_fractions: bytes ratio -> ``[L][H]`` twice, shares of its KV pairs each head keeps as
            they are and in either tier, for budget ``profile``; None: both by ``head_fractions``.

    Raises:
        ValueError: for fractions that are missing or of another shape.
    """

    def __init__(
        self,
        geometry: CacheGeometry,
        budget: Budget,
        head_fractions: Callable[[float], Sequence[Sequence[float]]] | None,
        head_importance: Sequence[Sequence[float]] | None,
        tier_fractions: Callable[[float], tuple[Grid, Grid]] | None = None,
    ) -> None:
        self._geometry = geometry
        self._budget = budget
        self._tier_fractions = tier_fractions
        self._head_fractions = None
        if budget in ("profile", "retrieval"):
            assert head_fractions is not None
            self._head_fractions = head_fractions
            self._head_importance = torch.tensor(head_importance, dtype=torch.float64)
            wanted = (geometry.num_layers, geometry.num_kv_heads)
            if self._head_importance.shape != wanted:
                found = tuple(self._head_importance.shape)
                raise ValueError(f"profile of {found} heads, not {wanted}")

    def pages(
        self,
        tier: Tier,
        ranking: Ranking,
        taken: torch.Tensor,
        plan: PrefixPlan,
        available: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Pages of each head in one tier, int64 ``[L, H]``.

        Args:
            tier: one of ``plan.tiers``.
            ranking: of each head's tokens.
            taken: int64 ``[L, H]``, tokens of each head in earlier tiers, on the device where this
                method put their pages.
            plan: of the prompt.
            available: int64 ``[L, H]``, pages each head has to choose from; None: all its tokens.
        """
        if tier.quantized:
            return self.quantized(ranking, taken, plan)
        return self.full(ranking, plan, available)

    @property
    def device(self) -> torch.device | None:
        """Where pages are allocated; None: where the scores are."""
        return None if self._by_score else torch.device("cpu")

    def full(
        self, ranking: Ranking, plan: PrefixPlan, available: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pages of KV pairs as they are, int64 ``[L, H]``; see :meth:`pages`."""
        geometry = self._geometry
        total = plan.num_full_blocks * geometry.pages_per_block
        if not total:
            place = ranking.order.device if self._by_score else None
            shape = geometry.num_layers, geometry.num_kv_heads
            return torch.zeros(shape, dtype=torch.int64, device=place)
        min_pages: int | torch.Tensor = plan.min_pages_per_head
        if not plan.num_candidate_tokens:
            for later in plan.tiers[1:]:
                if later.num_pages >= pages_for(plan.num_protected_tokens, later.page_tokens):
                    min_pages = 0  # a head's protected tokens may all be in that tier
        elif available is not None:  # a head may have too few pairs that are not quantized yet
            min_pages = available.clamp(max=plan.min_pages_per_head)
        if self._by_score:
            return budgets.allocate_adaptive(
                ranking.scores,
                total,
                geometry.page_tokens,
                min_pages,
                max_pages=available,
                per_layer=self._per_layer,
            )
        if self._head_fractions is not None:
            return budgets.allocate_from_fractions(
                self._fractions(plan, plan.full_share, tier=0),
                self._head_importance,
                total,
                min_pages if isinstance(min_pages, int) else min_pages.cpu(),
                plan.num_prefix_blocks * geometry.pages_per_head,
                None if available is None else available.cpu(),
            )
        return budgets.allocate_uniform(total, geometry.num_layers, geometry.num_kv_heads)

    def quantized(self, ranking: Ranking, taken: torch.Tensor, plan: PrefixPlan) -> torch.Tensor:
        """Pages of the quantized tier, int64 ``[L, H]``; see :meth:`pages`."""
        geometry = self._geometry
        total = plan.num_quantized_pages * geometry.num_heads
        page_tokens = plan.quantized_page_tokens
        left = (max(1, plan.num_protected_tokens) - taken).clamp_min(0)
        least = (left + page_tokens - 1) // page_tokens
        if self._by_score:
            return budgets.allocate_remaining(
                ranking.scores, taken, total, page_tokens, least, per_layer=self._per_layer
            )
        if self._head_fractions is not None:
            num_tokens = plan.boundary_tokens
            most = (num_tokens - taken + page_tokens - 1) // page_tokens
            missing = total - int(most.sum())
            if missing > 0:  # whole blocks can be a little more than there is to keep
                most += -(-missing // most.numel())
            kept = self._fractions(plan, plan.share, tier=1)
            # Rounded up: a head that shall keep everything must not miss its last few tokens.
            wanted = ((kept * num_tokens - taken) / page_tokens - EPSILON).ceil().clamp_min(0)
            num_pages = num_tokens / page_tokens
            return budgets.allocate_from_fractions(
                wanted / num_pages, self._head_importance, total, least, num_pages, most
            )
        return budgets.allocate_uniform(total, geometry.num_layers, geometry.num_kv_heads)

    def quantized_later(
        self,
        ranking: Ranking,
        taken: torch.Tensor,
        plan: PrefixPlan,
        least: torch.Tensor,
        most: torch.Tensor,
    ) -> torch.Tensor:
        """As :meth:`quantized`, where earlier pairs compete; pages that no head fills are left.

        Args:
            ranking: of the tokens that the full tier has not taken.
            taken: int64 ``[L, H]``, tokens that it has.
            plan: of the compression.
            least, most: int64 ``[L, H]``, pages of each head.
        """
        geometry = self._geometry
        total, size = plan.num_quantized_pages * geometry.num_heads, plan.quantized_page_tokens
        if self._by_score:
            return budgets.allocate_at_most(
                ranking.scores, total, size, least, most, per_layer=self._per_layer
            )
        least, most = least.cpu(), most.cpu()
        if self._head_fractions is not None:
            num_pages = plan.boundary_tokens / size
            kept = self._fractions(plan, plan.share, tier=1)
            wanted = kept - taken.cpu() / plan.boundary_tokens
            total = min(total, int(most.sum()))
            return budgets.allocate_from_fractions(
                wanted.clamp_min(0), self._head_importance, total, least, num_pages, most
            )
        even = budgets.allocate_uniform(total, geometry.num_layers, geometry.num_kv_heads)
        return even.minimum(most)

    @property
    def _by_score(self) -> bool:
        return self._budget in ("adaptive", "adaptive-per-layer")

    @property
    def _per_layer(self) -> bool:
        return self._budget == "adaptive-per-layer"

    def _fractions(self, plan: PrefixPlan, keep_ratio: float, tier: int) -> torch.Tensor:
        """Shares of each head as they are (tier 0), or in either tier (1)."""
        if self._tier_fractions is not None and len(plan.tiers) > 1:
            held = plan.num_compressed_blocks / plan.num_prefix_blocks
            return torch.tensor(self._tier_fractions(held)[tier], dtype=torch.float64)
        assert self._head_fractions is not None
        return torch.tensor(self._head_fractions(keep_ratio), dtype=torch.float64)
