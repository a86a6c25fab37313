"""Scheduler side: the block manager that reserves, frees and shares blocks.

The block table row of a request goes through three shapes::

    prefill      [prompt blocks ...]
    crossing     [prompt blocks ...][n' reserved blocks]      the step that completes the prefix
    folded       [n' compressed][null ...][dense tail ...]    from a later step on

In the folded row the block of logical index ``i`` is again at ``row[i]`` for every dense token, so
vLLM's slot mapping, block accounting and prefix caching go on unchanged; the dead entries between
the compressed blocks and the tail are the null block. The prompt's blocks are returned to the pool
in the fold. They are never written to, so they stay valid in the prefix cache until reused.

A request that starts from a cached compressed prefix has a folded row from its first step on. With
a prefill budget a folded row crosses again, whenever its dense tail has grown by so much.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_kvzip.metrics import FAILURES
from vllm_kvzip.storage.head_pages import fold_row
from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import (
    CompressedPrefixCache,
    PrefixRun,
    Reservation,
)
from vllm_kvzip.vllm_bridge.scheduler.prefix_lookup import PrefixLookup, options
from vllm_kvzip.vllm_bridge.scheduler.unconfirmed import UnconfirmedRuns
from vllm_kvzip.vllm_bridge.stats_export import HeldBytes, SchedulerRecorder
from vllm_kvzip.vllm_bridge.step_message import StepPrefixes
from vllm_kvzip.vllm_bridge.symbols import FullAttentionManager

if TYPE_CHECKING:
    from collections.abc import Container, Sequence

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.scheduler.terms import CompressionTerms
    from vllm_kvzip.vllm_bridge.symbols import KVCacheBlock, Request


class HeadPageManager(FullAttentionManager):
    """Block manager of one group of compressed layers.

    What is compressed follows from the prompt's length and the request's options
    (``PrefixRule``), so scheduler and workers agree on it without a
    message.

    Attributes:
        rule: what is compressed, into how many blocks.
        request: the request that the next calls concern. vLLM tells a manager little of it; our
            scheduler sets it.
        prefixes: cached compressed prefixes.
        unconfirmed: compressions of which the workers have not told what became of them.
    """

    def __init__(self, kv_cache_spec: CompressionTerms, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.rule = replace(kv_cache_spec.rule, pool_blocks=self.block_pool.num_gpu_blocks)
        self._recorder = SchedulerRecorder(kv_cache_spec.metrics_directory)
        self._held = HeldBytes(self.block_pool, kv_cache_spec.block_bytes, self._recorder)
        self.prefixes = CompressedPrefixCache(
            self.block_pool, self.kv_cache_group_id, kv_cache_spec.reuse, self._recorder
        )
        self._lookup = PrefixLookup(
            self.prefixes, self.rule, kv_cache_spec.reuse, self._null_block, kv_cache_spec.repeat
        )
        self.request: Request | None = None
        self._plans: dict[str, PrefixPlan | None] = {}  # what is compressed next
        self._settled: set[str] = set()  # running, and nothing is compressed any more
        self._unreported: dict[str, str] = {}  # why a request is left alone
        self._reserved: dict[str, Reservation] = {}
        self._raw_hits: dict[str, int] = {}  # tokens found in the raw prefix cache
        self._raw_tokens: dict[str, int] = {}  # computed over the raw prefix, once that is known
        self._runs: dict[str, PrefixRun] = {}  # what a folded row begins with
        self._crossing: list[str] = []  # reserved in the step that is being scheduled
        self.unconfirmed = UnconfirmedRuns(self.prefixes, self._recorder)
        self._found: tuple[Request | None, PrefixRun] | None = None  # who looked last, and found
        self._hits: dict[str, int] = {}  # started on a run in that step

    def new_step_starts(self) -> None:
        """Fold every row that is ready, before anybody asks for blocks.

        vLLM walks through the running requests in order and preempts the last one when blocks run
        out, which is often the one that has just completed its prompt.
        """
        super().new_step_starts()
        for request_id, reservation in list(self._reserved.items()):
            request = reservation.request
            if request is None:
                continue
            processed = request.num_computed_tokens - request.num_in_flight_tokens
            if processed >= reservation.run.plan.ready_tokens:
                self._fold(request_id, request.num_prompt_tokens)

    def find_longest_cache_hit(
        self, block_hashes: Any, max_length: int, **kwargs: Any
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The raw or the compressed prefix that serves most of the request's context.

        vLLM calls this on the instance when there is one KV cache group. A compressed hit is
        returned as the start of a folded row: ``[n' compressed][null ...][dense tail ...]``.
        """
        self._found = None
        most_raw = self._lookup.most_raw_tokens(self.request, max_length)
        raw, raw_tokens = super().find_longest_cache_hit(block_hashes, most_raw, **kwargs)
        found = self._lookup.find(self.request, block_hashes, max_length, raw_tokens)
        if found is None:
            return raw, raw_tokens
        run, blocks = found
        self._found = (self.request, run)
        return (blocks,), len(blocks) * self.block_size

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kw: Any
    ) -> None:
        """Adopt what was found in the prefix cache, raw or compressed."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kw)
        run = self.prefixes.owner(new_computed_blocks)
        if run is None:
            self._raw_hits[request_id] = len(new_computed_blocks) * self.block_size
        else:
            self._plans[request_id] = self._next_plan(request_id, run.plan)
            self._unreported.pop(request_id, None)
            self._hits[request_id] = run.serial
            self.unconfirmed.joined(run, self._at_hand(request_id))
            self._recorder.prefix_hit(run.plan.boundary_tokens)
            self._join(request_id, run)

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Learn the prompt length; once the prefix is processed, fold the row and free blocks."""
        if num_prompt_tokens is None or request_id in self._settled:
            return
        if request_id not in self._plans:
            about = (num_prompt_tokens, options(self._at_hand(request_id)))
            self._plans[request_id] = self.rule.next_plan(*about)
            reason = self.rule.skip_reason(*about)
            if reason and reason not in FAILURES:  # those have been counted
                self._unreported[request_id] = reason
        reservation = self._reserved.get(request_id)
        if reservation and processed_computed_tokens >= reservation.run.plan.ready_tokens:
            self._fold(request_id, num_prompt_tokens)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        **kwargs: Any,
    ) -> int:
        """vLLM's count plus the blocks that are about to hold the compressed prefix."""
        if request_id not in self._settled:
            found = self.prefixes.owner(new_computed_blocks)
            extra = self._extra_row_blocks(request_id, num_tokens_main_model, found)
            num_tokens += extra * self.block_size
        count: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )
        if apply_admission_cap and (peak := self.rule.peak_blocks) is not None:
            if not self._is_off(request_id):
                count = min(count, peak)
        return count

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for the next tokens; in the crossing step the reserve follows them in the row."""
        if request_id in self._settled:
            blocks = list(
                super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
            )
            if blocks:
                self.prefixes.blocks_taken(blocks)
            return blocks
        if reason := self._unreported.pop(request_id, None):
            self._recorder.skipped(reason)
        if reservation := self._reserved.get(request_id):
            num_tokens += len(reservation.run.blocks) * self.block_size
        blocks = list(super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))
        if reservation is None:
            count = self._extra_row_blocks(request_id, num_tokens_main_model)
            if count:
                if request_id not in self._runs:
                    self._raw_tokens[request_id] = num_tokens_main_model
                blocks += self._reserve(request_id, count)
            elif self._plans.get(request_id) is None:
                self._settled.add(request_id)
        self.prefixes.blocks_taken(blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish raw prompt blocks as vLLM does, and others only for users of the same prefix."""
        num_raw = self._raw_tokens.get(request.request_id)
        if num_raw is not None:
            num_tokens = min(num_tokens, request.num_prompt_tokens, num_raw)
        elif (run := self._runs.get(request.request_id)) is not None:
            self._cache_dense_tail(request, run, num_tokens)
            return
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request (end, abort or preemption) and hand over all of its blocks."""
        self._plans.pop(request_id, None)
        self._settled.discard(request_id)
        self._unreported.pop(request_id, None)
        self._raw_hits.pop(request_id, None)
        self._raw_tokens.pop(request_id, None)
        self._hits.pop(request_id, None)
        reservation = self._reserved.pop(request_id, None)
        if reservation and (reservation.request is None or reservation.request.is_finished()):
            self._recorder.skipped("ended_before_decode")
        if (run := self._runs.pop(request_id, None)) is not None:
            self._leave(run)
        return list(super().pop_blocks_for_free(request_id))

    def close(self) -> None:
        """The engine ends: its gauges are of nothing."""
        self._recorder.close()

    def outcome(self, request: Request) -> dict[str, Any]:
        """What became of a request's prompt, as plain values for its client; it still has its row.

        Either ``compressed_tokens``, ``blocks_before``, ``blocks_held`` and ``keep_ratio``, the
        ratio of the two, or ``left_alone`` with one of ``metrics.SKIP_REASONS``.
        """
        if run := self._runs.get(request.request_id):
            return {
                "compressed_tokens": run.plan.boundary_tokens,
                "blocks_before": run.plan.num_prefix_blocks,
                "blocks_held": run.plan.num_compressed_blocks,
                "keep_ratio": run.plan.num_compressed_blocks / run.plan.num_prefix_blocks,
            }
        reason = self.rule.skip_reason(request.num_prompt_tokens, options(request))
        return {"left_alone": reason or "ended_before_decode"}

    def end_of_schedule(
        self, scheduled: Container[str], repeats: dict[str, int] | None = None
    ) -> StepPrefixes | None:
        """Publish the prefixes that the scheduled step completes; tell the workers of it.

        The workers compact at the start of the next step, whatever becomes of the request by then,
        so whoever is scheduled after this call finds the run in place.

        Args:
            scheduled: ids of the requests in the step.
            repeats: how many chunks of whose context the model repeats before it.

        Returns:
            None when there is nothing to tell.
        """
        kept, reserved = {}, {}
        for request_id in [rid for rid in self._crossing if rid in scheduled]:
            if reservation := self._reserved.get(request_id):
                run = reservation.run
                reserved[request_id] = run.serial
                self.unconfirmed.add(run, reservation.request)
                if run.prefix_hash and self.prefixes.add(run):
                    kept[request_id] = run.serial
        self._crossing.clear()
        self._held.report()
        hits, self._hits = self._hits, {}
        dropped = self.prefixes.take_dropped()
        left_alone = self.unconfirmed.take_left_alone()
        news = kept, hits, dropped, reserved, left_alone, repeats or {}
        return StepPrefixes(*news) if any(news) else None

    def _reserve(self, request_id: str, count: int) -> list[KVCacheBlock]:
        """Put blocks for the compressed prefix at the end of the row."""
        plan = self._plans[request_id]
        assert plan is not None
        blocks: list[KVCacheBlock] = self.block_pool.get_new_blocks(count)
        row = self.req_to_blocks[request_id]
        request, key = self._at_hand(request_id), None
        if self.enable_caching and request is not None:
            key = self._lookup.shared_hash(request, plan, self._raw_hits.get(request_id, 0))
        run = PrefixRun(plan, blocks, key)
        self._reserved[request_id] = Reservation(len(row), run, request)
        self._crossing.append(request_id)
        row.extend(blocks)
        return blocks

    def _fold(self, request_id: str, num_prompt_tokens: int) -> None:
        reservation = self._reserved.pop(request_id)
        plan = reservation.run.plan
        row = self.req_to_blocks[request_id]
        before = [block for block in row[: plan.num_prefix_blocks] if not block.is_null]
        row[:] = fold_row(row, plan, reservation.start, self._null_block)
        if (earlier := self._runs.pop(request_id, None)) is not None:
            self._leave(earlier)
        self.block_pool.free_blocks(reversed(before))
        self.unconfirmed.folded(reservation.run, num_prompt_tokens, self.rule.block_size)
        self._join(request_id, reservation.run)
        self._plans[request_id] = self._next_plan(request_id, plan, reservation.request)

    def _join(self, request_id: str, run: PrefixRun) -> None:
        self._runs[request_id] = run
        run.users += 1
        self.prefixes.used(run)
        if run.users == 1:
            self._held.add(run.plan, 1)

    def _leave(self, run: PrefixRun) -> None:
        run.users -= 1
        self.prefixes.used(run)
        if run.users == 0:
            self._held.add(run.plan, -1)

    def _cache_dense_tail(self, request: Request, run: PrefixRun, num_tokens: int) -> None:
        """Publish full blocks that were computed over a compressed prefix from the first on."""
        row = self.req_to_blocks[request.request_id]
        first = self.num_cached_block.get(request.request_id, 0)
        end = min(num_tokens // self.block_size, len(request.block_hashes))
        for index in range(first, end):
            self.prefixes.cache_tail(
                run, request.block_hashes[index], row[index], (index + 1) * self.block_size
            )
        self.num_cached_block[request.request_id] = max(first, end)

    def _extra_row_blocks(
        self, request_id: str, num_tokens_main_model: int, found: PrefixRun | None = None
    ) -> int:
        """Blocks in the row beyond vLLM's own count once ``num_tokens_main_model`` are computed.

        ``found`` is what the request is about to start from.
        """
        if reservation := self._reserved.get(request_id):
            return len(reservation.run.blocks)
        if found is not None:
            plan = self._next_plan(request_id, found.plan)
        elif request_id in self._plans:
            plan = self._plans[request_id]
        else:
            # vLLM's admission check asks for the whole request before anything else.
            request = self._at_hand(request_id)
            num_prompt = request.num_prompt_tokens if request else num_tokens_main_model
            plan = self.rule.next_plan(num_prompt, options(request))
        if plan is None or num_tokens_main_model < plan.ready_tokens:
            return 0
        return plan.num_compressed_blocks

    def plan_ahead(self, request: Request) -> tuple[PrefixPlan | None, bool]:
        """What a request compresses next, and whether another compression is still to come first.

        Args:
            request: it runs, or waits and has just looked for what it starts from.
        """
        about = (request.num_prompt_tokens, options(request))
        if reservation := self._reserved.get(request.request_id):  # its row is to be folded
            return self.rule.next_plan(*about, reservation.run.plan), True
        if self.req_to_blocks.get(request.request_id):
            return self._plans[request.request_id], False
        found = self._found[1] if self._found and self._found[0] is request else None
        return self.rule.next_plan(*about, found.plan if found else None), False

    def fits_uncompressed(self, request: Request) -> bool:
        """Whether it can be served uncompressed to its end; a prefill budget lets others in."""
        if self.rule.prefill_blocks is None:
            return True
        longest = request.num_prompt_tokens + request.max_tokens
        return bool(longest <= (self.block_pool.num_gpu_blocks - 1) * self.block_size)

    def _next_plan(
        self, request_id: str, done: PrefixPlan, request: Request | None = None
    ) -> PrefixPlan | None:
        """What a request compresses after ``done``."""
        request = request or self._at_hand(request_id)
        if request is None:
            return None
        return self.rule.next_plan(request.num_prompt_tokens, options(request), done)

    def _is_off(self, request_id: str) -> bool:
        return options(self._at_hand(request_id)).is_off

    def _at_hand(self, request_id: str) -> Request | None:
        """The request vLLM asks for, if our scheduler introduced it."""
        request = self.request
        return request if request is not None and request.request_id == request_id else None
