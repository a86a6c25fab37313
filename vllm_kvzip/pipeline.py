"""Score, budget, select, compact: what happens to a prompt's KV cache, in that order."""

from __future__ import annotations

from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from vllm_kvzip import budgeting
from vllm_kvzip.compaction import PageCodec, PageStore, compact_layer
from vllm_kvzip.core import (
    CacheGeometry,
    CompressedPrefix,
    CompressionReport,
    KeepPlan,
    LayerInputs,
    PrefixPlan,
)
from vllm_kvzip.head_pages import PagePool, deal_pages
from vllm_kvzip.selection import protect, select

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vllm_kvzip.config import Budget
    from vllm_kvzip.prefix_rule import PrefixRule
    from vllm_kvzip.rotary import RotaryTables
    from vllm_kvzip.scoring import Scorer


class Compressor:
    """Compresses one prompt at a time; holds no state between prompts.

    Args:
        geometry: shape of the compressed layers.
        pool: where head pages lie.
        codec: element order inside a page.
        rule: what follows from a prompt's length.
        scorer: makes the scores.
        budget: one of :data:`~vllm_kvzip.config.Budget`.
        head_fractions: keep ratio -> ``[L][H]``, share of its KV pairs each head keeps, for
            budgets ``profile`` and ``retrieval``.
        head_importance: ``[L][H]``, which heads come first; likewise.
        rotary: of each layer, for scorers that want it.
        seed: mixed into each prompt's seed.

    Raises:
        ValueError: for fractions that are missing or of another shape.
    """

    def __init__(
        self,
        *,
        geometry: CacheGeometry,
        pool: PagePool,
        codec: PageCodec,
        rule: PrefixRule,
        scorer: Scorer,
        budget: Budget,
        head_fractions: Callable[[float], Sequence[Sequence[float]]] | None = None,
        head_importance: Sequence[Sequence[float]] | None = None,
        rotary: Sequence[RotaryTables | None] | None = None,
        seed: int = 0,
    ) -> None:
        self._scorer = scorer
        self._rotary = rotary or [None] * geometry.num_layers
        self._geometry = geometry
        self._pool = pool
        self._codec = codec
        self._rule = rule
        self._budget = budget
        self._seed = seed
        self._head_fractions = None
        if budget in ("profile", "retrieval"):
            assert head_fractions is not None
            self._head_fractions = head_fractions
            self._head_importance = torch.tensor(head_importance, dtype=torch.float64)
            wanted = (geometry.num_layers, geometry.num_kv_heads)
            if self._head_importance.shape != wanted:
                found = tuple(self._head_importance.shape)
                raise ValueError(f"profile of {found} heads, not {wanted}")

    def compress(
        self,
        pages: torch.Tensor,
        *,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        plan: PrefixPlan,
        observation_queries: Sequence[torch.Tensor] | None,
        reconstruction: torch.Tensor | None = None,
        scale: float,
        seed: int,
        earlier: CompressedPrefix | None = None,
    ) -> tuple[CompressedPrefix, CompressionReport]:
        """Compress the prefix of one prompt.

        Args:
            pages: ``[num_pages, 2 * N * D]``, the pool; only pages of ``target_blocks`` change.
            source_blocks: raw blocks of the prefix in logical order, from ``plan.start_blocks`` on.
            target_blocks: blocks that will hold what is kept.
            plan: from the rule, for this prompt.
            observation_queries: per layer float32 ``[W, H, G, D]``, if the scorer asks for them.
            reconstruction: float32 ``[L, H, T]``, if the scorer asks for it.
            scale: softmax scale.
            seed: equal for equal prefixes.
            earlier: what was kept of the blocks before, with its scores; competes with the rest.
        """
        seconds = dict.fromkeys(("score", "select", "compact"), 0.0)
        geometry = self._geometry
        store = PageStore(pages, self._codec, geometry.block_size, geometry.head_dim)
        sources = self._pool.page_ids(torch.tensor(source_blocks))  # [L, H, nb]
        with _timed(seconds, "score"):
            scores = self._score(
                store, sources, plan, observation_queries, reconstruction, scale, seed
            )
        with _timed(seconds, "select"):
            available = None
            if earlier is not None:
                available = earlier.pages + sources.shape[2]
                sources, scores = _behind(earlier, sources, scores, geometry.block_size)
            num_sinks, num_recent = self._rule.protected_in_prefix(plan.boundary_tokens)
            ranked = protect(scores, num_sinks, num_recent)
            budgets = self._allocate(ranked, plan, available)
            keep = select(scores, budgets, geometry.block_size, num_sinks, num_recent)
            kept_scores = None
            if self._rule.prefill_blocks is not None:
                heads = torch.arange(budgets.numel()).repeat_interleave(keep.offsets.diff())
                kept_scores = scores.flatten(0, 1)[heads, keep.positions]
        with _timed(seconds, "compact"):
            targets = deal_pages(target_blocks, budgets, self._pool)
            self._compact(store, sources, keep, targets)
        kept_ratio = int(budgets.sum()) / (geometry.pages_per_block * plan.num_prefix_blocks)
        prefix = CompressedPrefix(targets, budgets, kept_scores)
        return prefix, CompressionReport(seconds, kept_ratio)

    def _score(
        self,
        store: PageStore,
        sources: torch.Tensor,
        plan: PrefixPlan,
        observation_queries: Sequence[torch.Tensor] | None,
        reconstruction: torch.Tensor | None,
        scale: float,
        seed: int,
    ) -> torch.Tensor:
        """Scores of the raw blocks, float32 ``[L, H, T]``."""
        geometry, first = self._geometry, plan.start_blocks * self._geometry.block_size
        scores = torch.empty(*sources.shape[:2], plan.boundary_tokens - first)
        for layer in range(geometry.num_layers):
            inputs = LayerInputs(
                layer=layer,
                num_layers=geometry.num_layers,
                keys=store.read_keys(sources[layer]).float(),
                values=store.read_values(sources[layer]).float()
                if self._scorer.needs_values
                else None,
                observation_queries=observation_queries[layer] if observation_queries else None,
                reconstruction=None if reconstruction is None else reconstruction[layer],
                rotary=self._rotary[layer],
                num_context_tokens=plan.ready_tokens,
                scale=scale,
                sink_tokens=self._rule.sink_tokens,
                recent_tokens=self._rule.recent_tokens,
                seed=seed + self._seed,
                first_position=first,
            )
            scores[layer] = self._scorer.score_layer(inputs)
        return scores

    def _allocate(
        self, scores: torch.Tensor, plan: PrefixPlan, available: torch.Tensor | None
    ) -> torch.Tensor:
        """Head pages per head, int64 ``[L, H]``; every page of the reserved blocks is used.

        ``available`` says how many pages each head has to choose from; None: all its tokens.
        """
        geometry = self._geometry
        total = plan.num_compressed_blocks * geometry.pages_per_block
        min_pages = self._rule.min_pages_per_head(plan.boundary_tokens)
        if self._budget in ("adaptive", "adaptive-per-layer"):
            return budgeting.allocate_adaptive(
                scores,
                total,
                geometry.block_size,
                min_pages,
                max_pages=available,
                per_layer=self._budget == "adaptive-per-layer",
            )
        if self._head_fractions is not None:
            fractions = torch.tensor(self._head_fractions(plan.share), dtype=torch.float64)
            return budgeting.allocate_from_fractions(
                fractions,
                self._head_importance,
                total,
                min_pages,
                plan.num_prefix_blocks,
                available,
            )
        return budgeting.allocate_uniform(total, geometry.num_layers, geometry.num_kv_heads)

    def _compact(
        self, store: PageStore, sources: torch.Tensor, keep: KeepPlan, targets: torch.Tensor
    ) -> None:
        """One layer after the other, so that only one layer's KV is ever copied at a time."""
        num_heads = self._geometry.num_kv_heads
        counts = keep.offsets.diff()
        heads = torch.arange(len(counts)).repeat_interleave(counts) % num_heads
        token_bounds = keep.offsets[::num_heads].tolist()
        page_bounds = (keep.offsets[::num_heads] // self._geometry.block_size).tolist()
        for layer in range(self._geometry.num_layers):
            tokens = slice(token_bounds[layer], token_bounds[layer + 1])
            pages = slice(page_bounds[layer], page_bounds[layer + 1])
            compact_layer(
                store, sources[layer], keep.positions[tokens], heads[tokens], targets[pages]
            )


def _behind(
    earlier: CompressedPrefix, sources: torch.Tensor, scores: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of a later compression: what was kept before, then what is new.

    Heads kept different numbers of pages, so their earlier pages are padded at the end; a pad has
    a score of minus infinity and is never chosen. Order within a head stays that of positions.

    Args:
        earlier: what was kept, with its scores.
        sources: int64 ``[L, H, n]``, pages of the new blocks.
        scores: float32 ``[L, H, n * N]``.
        block_size: N.

    Returns:
        pages ``[L, H, w + n]`` and scores ``[L, H, (w + n) * N]``, w being the most pages a head
        kept.
    """
    assert earlier.scores is not None
    old_pages = earlier.padded.to(torch.int64)
    width = old_pages.shape[2]
    filled = torch.arange(width) < earlier.pages[:, :, None]
    old_scores = torch.full((*old_pages.shape, block_size), float("-inf"))
    old_scores[filled] = earlier.scores.view(-1, block_size)
    return (
        torch.cat([old_pages, sources], dim=2),
        torch.cat([old_scores.flatten(2), scores], dim=2),
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begin = perf_counter()
    yield
    seconds[stage] += perf_counter() - begin
