"""Score, budget, select, compact: what happens to a prompt's KV cache, in that order."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.budgeting.allocation import PageAllocator
from vllm_kvzip.budgeting.candidates import Candidates, of_kept, with_earlier
from vllm_kvzip.budgeting.dense_layers import with_dense_layers
from vllm_kvzip.budgeting.selection import check_budgets, first_and_last, rank, rank_protected, take
from vllm_kvzip.budgeting.tiered_rounds import TieredCandidates, choose, mark_sinks
from vllm_kvzip.clocks import HostClock, Stopwatch
from vllm_kvzip.core import (
    CacheGeometry,
    CompressedPrefix,
    KeepPlan,
    PrefixPlan,
    StoredTier,
)
from vllm_kvzip.errors import NotFiniteError
from vllm_kvzip.layer_inputs import LayerInputs
from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.planning.round_tiers import scored_ratio
from vllm_kvzip.storage.head_pages import PagePool, deal_pages

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_kvzip.budgeting.allocation import Grid
    from vllm_kvzip.budgeting.kept_positions import KeptPositions
    from vllm_kvzip.budgeting.quality import QualityTarget
    from vllm_kvzip.budgeting.selection import Ranking
    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.config import Budget
    from vllm_kvzip.model.rotary import RotaryTables
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.scoring import Scorer
    from vllm_kvzip.storage.page_store import PageStore


STAGES = ("score", "select", "compact")


class Compressor:
    """Compresses one prompt at a time; holds no state between prompts.

    Everything is asked for in the stream of the device where the pool lies, and nothing waits for
    it, but for two things: what competes with what an earlier compression kept is counted, and how
    many blocks a quality loss needs is read. Numbers that are NaN or infinite end a compression on
    the CPU. Elsewhere nobody looks: scores become equal then, so that all goes on as with any
    prompt, and :attr:`~vllm_kvzip.core.CompressedPrefix.sound` will tell.

    Args:
        geometry: shape of the layers of the pool.
        pool: where head pages lie.
        store: reads and compacts them; only pages of a prompt's target blocks change.
        rule: what follows from a prompt's length.
        scorer: makes the scores.
        budget: one of :data:`~vllm_kvzip.config.Budget`.
        head_fractions: keep ratio -> ``[L][H]``, share of its KV pairs each head keeps, for
            budgets ``profile`` and ``retrieval``.
        head_importance, tier_fractions: see ``PageAllocator``.
        rotary: of each layer, for scorers that want it.
        soft_cap, sink_logits: see :class:`~vllm_kvzip.layer_inputs.LayerInputs`; the latter
            ``[H * G]``, of each layer.
        seed: mixed into each prompt's seed.
        clock: measures the stages.
        first_layer, layers_of_model: where the first of these layers is among the compressed layers
            of the model, and how many these are; None: there are no others.
        num_dense_layers: the last layers of the pool, which keep every KV pair; what is said of
            each layer above is said of those before them. Not with a prefill budget.
        quality: chooses how many blocks a plan with a quality loss needs; None where none has one.

    Raises:
        ValueError: for fractions that are missing or of another shape.
    """

    def __init__(
        self,
        *,
        geometry: CacheGeometry,
        pool: PagePool,
        store: PageStore,
        rule: PrefixRule,
        scorer: Scorer,
        budget: Budget,
        head_fractions: Callable[[float], Sequence[Sequence[float]]] | None = None,
        head_importance: Sequence[Sequence[float]] | None = None,
        tier_fractions: Callable[[float], tuple[Grid, Grid]] | None = None,
        rotary: Sequence[RotaryTables | None] | None = None,
        soft_cap: float | None = None,
        sink_logits: Sequence[torch.Tensor | None] | None = None,
        seed: int = 0,
        clock: Clock | None = None,
        first_layer: int = 0,
        layers_of_model: int | None = None,
        num_dense_layers: int = 0,
        quality: QualityTarget | None = None,
    ) -> None:
        self._quality = quality
        self._clock = clock or HostClock()
        self._num_dense_layers = num_dense_layers
        geometry = replace(geometry, num_layers=geometry.num_layers - num_dense_layers)
        self._first_layer = first_layer
        self._layers_of_model = layers_of_model or geometry.num_layers
        self._scorer = scorer
        self._rotary = rotary or [None] * geometry.num_layers
        self._soft_cap = soft_cap
        self._sink_logits = sink_logits or [None] * geometry.num_layers
        self._geometry = geometry
        self._pool = pool
        self._store = store
        self._rule = rule
        self._seed = seed
        self._allocator = PageAllocator(
            geometry, budget, head_fractions, head_importance, tier_fractions
        )

    def compress(
        self,
        *,
        source_blocks: Sequence[int],
        target_blocks: Sequence[int],
        plan: PrefixPlan,
        observation_queries: Sequence[torch.Tensor] | None,
        reconstruction: torch.Tensor | None = None,
        scale: float,
        seed: int,
        earlier: CompressedPrefix | None = None,
        record: KeptPositions | None = None,
    ) -> tuple[CompressedPrefix, Stopwatch]:
        """Compress the prefix of one prompt.

        Args:
            source_blocks: raw blocks of the prefix in logical order, from ``plan.start_blocks`` on.
            target_blocks: blocks that will hold what is kept.
            plan: from the rule, for this prompt.
            observation_queries: per layer ``[W, H, G, D]``, if the scorer asks for them.
            reconstruction: float32 ``[L, H, T]``, if the scorer asks for it.
            scale: softmax scale.
            seed: equal for equal prefixes.
            earlier: what was kept of the blocks before, with its scores; competes with the rest.
            record: is told which tokens each head keeps, where somebody asks for them.

        Returns:
            where the kept pairs lie, and how long the stages took (``select`` includes budgets).

        Raises:
            NotFiniteError: if a key, value or score is NaN or infinite (seen on the CPU). Nothing
                has been written then.
            ValueError: if the scorer returned scores of another shape.
        """
        stages = Stopwatch(self._clock, STAGES)
        geometry = self._geometry
        sources = self._pool.page_ids(self._on_device(source_blocks))  # [all layers, H, pages]
        num_pages = sources.shape[2]
        first, anew = plan.start_blocks * geometry.block_size, None
        if self._rule.has_rounds and self._rule.tiers is None and self._scorer.rescores_kept:
            anew = Candidates.of_round(earlier, sources, first, geometry.page_tokens)
            sources = anew.pages
        with stages.stage("score"):
            scores, transform, sound = self._score(
                sources[: geometry.num_layers],
                plan,
                observation_queries,
                reconstruction,
                scale,
                seed,
                earlier,
                anew,
            )
        with stages.stage("select"):
            available, quantized_pages, fitted, kept_positions = None, None, None, None
            if earlier is not None and self._rule.tiers is not None:
                about = earlier, sources, scores, geometry.page_tokens
                candidates = TieredCandidates.of(*about)
                keeps, kept_scores, quantized_pages = choose(
                    candidates, plan, scores.shape[2], self._allocator
                )
                sources = candidates.pages
            else:
                if anew is not None:
                    available = anew.available
                elif earlier is not None:
                    available = earlier.pages + sources.shape[2]
                    sources, scores = with_earlier(earlier, sources, scores, geometry.page_tokens)
                ends = plan.num_sink_tokens, plan.num_recent_tokens
                if earlier is None:
                    ranking = rank(scores, *ends)
                else:
                    ranking = rank_protected(scores, first_and_last(scores, *ends))
                if plan.quality_loss is not None:
                    assert self._quality is not None
                    plan = fitted = self._quality.fit(ranking, plan)
                keeps = self._choose(ranking, plan, available)
                kept_scores = []
                if anew is not None:
                    kept_positions = of_kept(anew.positions, keeps[0])
                elif self._rule.has_rounds:
                    kept_scores = self._scores_for_later(scores, keeps, plan)
            if record is not None:
                record.take(keeps, first, num_pages * geometry.page_tokens)
            num_dense = self._num_dense_layers * geometry.num_kv_heads * num_pages
            kept_blocks = plan.num_compressed_blocks - plan.num_dense_blocks
            total = kept_blocks * geometry.pages_per_block + num_dense
            targets = deal_pages(self._on_device(target_blocks), total, self._pool)
            if earlier is not None and earlier.key_transform is not None:
                transform = earlier.key_transform  # of all pages, those of before among them
            elif transform is not None and earlier is None:
                # The first tokens of other heads are not quantized.
                transform = transform.where_first(keeps[0].pages == 0)
                transform = transform.with_unchanged(self._num_dense_layers)
            keeps = [
                with_dense_layers(
                    keep, self._num_dense_layers, 0 if number else num_pages, geometry.page_tokens
                )
                for number, keep in enumerate(keeps)
            ]
        tiers: list[StoredTier] = []
        for tier, keep in zip(plan.tiers, keeps, strict=True):
            count = tier.num_blocks * geometry.pages_per_block
            if not tiers:
                count += num_dense
            own, targets = targets[:count], targets[count:]
            with stages.stage("quantize" if tier.quantized else "compact"):
                if tier.quantized:
                    assert transform is not None
                    own = self._store.quantize(sources, keep, own, transform, quantized_pages)
                else:
                    self._store.compact(sources, keep, own)
            tiers.append(StoredTier(own, keep.pages, tier.split))
        full_scores, quantized_scores = [*kept_scores, None, None][:2]
        prefix = CompressedPrefix(
            tuple(tiers),
            full_scores,
            transform,
            sound,
            positions=kept_positions,
            fitted=fitted,
            quantized_scores=quantized_scores,
        )
        return prefix, stages

    def _scores_for_later(
        self, scores: torch.Tensor, keeps: list[KeepPlan], plan: PrefixPlan
    ) -> list[torch.Tensor]:
        """Scores of what is kept, tier by tier, where it will compete; see ``tiered_rounds.py``."""
        if self._rule.tiers is not None:
            scores = mark_sinks(scores, plan.num_sink_tokens)
        return [of_kept(scores, keep) for keep in keeps]

    def _choose(
        self, ranking: Ranking, plan: PrefixPlan, available: torch.Tensor | None
    ) -> list[KeepPlan]:
        """What each head keeps, tier by tier: its best tokens in the most precise one.

        Args:
            ranking: of each head's tokens.
            plan: of the prompt.
            available: int64 ``[L, H]``, pages each head has to choose from; None: all its tokens.
        """
        geometry = self._geometry
        order = ranking.order
        # Tokens of each head in earlier tiers, twice: where budgets are made, and on the device.
        taken, first_rank = (
            torch.zeros(order.shape[:2], dtype=torch.int64, device=device)
            for device in (self._allocator.device or order.device, order.device)
        )
        keeps, full_tokens = [], taken
        for tier in plan.tiers:
            pages = self._allocator.pages(tier, ranking, taken, plan, available)
            taken = taken + pages * tier.page_tokens
            full_tokens = full_tokens if tier.quantized else taken
            pages, total = self._to_device(pages), tier.num_pages * geometry.num_heads
            keeps.append(take(ranking, first_rank, pages, tier.page_tokens, total))
            first_rank = first_rank + pages * tier.page_tokens
        if taken.device.type == "cpu":
            check_budgets(full_tokens, taken, plan.num_protected_tokens, order.shape[-1])
        return keeps

    def _on_device(self, blocks: Sequence[int]) -> torch.Tensor:
        """Block ids as int64, without waiting for the device."""
        return self._to_device(torch.tensor(blocks, dtype=torch.int64))

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        device = self._store.device
        if device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    def _score(
        self,
        sources: torch.Tensor,
        plan: PrefixPlan,
        observation_queries: Sequence[torch.Tensor] | None,
        reconstruction: torch.Tensor | None,
        scale: float,
        seed: int,
        earlier: CompressedPrefix | None,
        anew: Candidates | None,
    ) -> tuple[torch.Tensor, KeyTransform | None, torch.Tensor | None]:
        """Scores of ``sources``, float32 ``[L, H, T]``; what quantized keys are freed of, where no
        earlier compression found it; and :attr:`~vllm_kvzip.core.CompressedPrefix.sound`.

        Sinks are left out of the mean. ``anew`` says more of the sources where what was kept is
        among them. A pad has a score of minus infinity, so that it is never chosen.
        """
        geometry, store = self._geometry, self._store
        num_sinks = plan.num_sink_tokens
        transforms, sums = [], []
        quantizes = len(plan.tiers) > 1
        first = plan.start_blocks * geometry.block_size
        shape = (*sources.shape[:2], sources.shape[2] * geometry.page_tokens)
        real = None if anew is None else anew.real
        scores = torch.empty(shape, device=store.device)
        for layer in range(geometry.num_layers):
            keys = store.read_keys(sources[layer], layer).float()
            values = None
            if self._scorer.needs_values:
                values = store.read_values(sources[layer], layer).float()
            if real is not None:
                for half in (keys, values):
                    if half is not None:
                        half.masked_fill_(~real[layer][..., None], 0.0)
            inputs = LayerInputs(
                layer=self._first_layer + layer,
                num_layers=self._layers_of_model,
                keys=keys,
                values=values,
                observation_queries=observation_queries[layer].float()
                if observation_queries
                else None,
                reconstruction=None if reconstruction is None else reconstruction[layer],
                rotary=self._rotary[layer],
                num_context_tokens=plan.num_observed_tokens,
                scale=scale,
                sink_tokens=self._rule.sink_tokens,
                recent_tokens=self._rule.recent_tokens,
                seed=seed + self._seed,
                first_position=first,
                # Rounds of a prefill budget compete with one another: the same for all of them.
                keep_ratio=self._scored_ratio(plan),
                soft_cap=self._soft_cap,
                sink_logits=None
                if (sinks := self._sink_logits[layer]) is None
                else sinks.float().view(geometry.num_kv_heads, geometry.group_size),
                positions=None if anew is None or real is None else anew.positions[layer],
                real=None if real is None else real[layer],
            )
            of_layer = self._scorer.score_layer(inputs)
            if of_layer.shape != shape[1:]:
                raise ValueError(
                    f"scorer {self._scorer.name} returned scores of shape {tuple(of_layer.shape)}, "
                    f"not {tuple(shape[1:])}"
                )
            scores[layer] = of_layer
            # One number that is not finite makes a sum so; without a copy of what is looked at.
            sums += [half.sum() for half in (inputs.keys, inputs.values) if half is not None]
            if quantizes and (earlier is None or earlier.key_transform is None):
                fit = KeyTransform.fit if earlier is None else KeyTransform.fit_late
                transforms.append(fit(inputs.keys, num_sinks))
        sound = torch.isfinite(scores).all() & torch.isfinite(torch.stack(sums)).all()
        transform = KeyTransform.stack(transforms) if transforms else None
        if sound.device.type == "cpu" and not sound:
            raise NotFiniteError("keys, values or scores are NaN or infinite")
        if sound.device.type != "cpu":
            scores.masked_fill_(~sound, 0.0)
        if real is not None:
            scores.masked_fill_(~real, float("-inf"))
        return scores, transform, None if sound.device.type == "cpu" else sound

    def _scored_ratio(self, plan: PrefixPlan) -> float:
        """The keep ratio that a scorer is told."""
        tiers = self._rule.tiers
        if tiers is not None and plan.num_candidate_tokens:
            return scored_ratio(tiers, plan.keep_ratio)
        return plan.share if len(plan.tiers) > 1 else plan.keep_ratio
