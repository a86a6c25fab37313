"""Scheduler side: the block manager that reserves, frees and shares blocks.

It does what vLLM's manager of full attention does, and keeps one :class:`RowState` for each request
that holds blocks. That file shows the shapes of a block table row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_kvzip.metrics import FAILURES
from vllm_kvzip.storage.head_pages import fold_row
from vllm_kvzip.vllm_bridge.scheduler.other_groups import OtherGroups
from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import CompressedPrefixCache
from vllm_kvzip.vllm_bridge.scheduler.prefix_lookup import PrefixLookup, options
from vllm_kvzip.vllm_bridge.scheduler.room import blocks_to_admit, new_row, up_to_first_crossing
from vllm_kvzip.vllm_bridge.scheduler.row_state import PrefixRun, Reservation, RowState
from vllm_kvzip.vllm_bridge.scheduler.step_news import publish_step
from vllm_kvzip.vllm_bridge.scheduler.unconfirmed import UnconfirmedRuns
from vllm_kvzip.vllm_bridge.stats_export import HeldBytes, SchedulerRecorder
from vllm_kvzip.vllm_bridge.symbols import FullAttentionManager

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.outcomes import Outcome
    from vllm_kvzip.vllm_bridge.scheduler.terms import CompressionTerms
    from vllm_kvzip.vllm_bridge.step_message import StepPrefixes
    from vllm_kvzip.vllm_bridge.symbols import KVCacheBlock, Request


class HeadPageManager(FullAttentionManager):
    """Block manager of one group of compressed layers.

    What is compressed follows from the prompt's length and the request's options
    (``PrefixRule``), so scheduler and workers agree on it without a message.

    Attributes:
        rule: what is compressed, into how many blocks.
        request: the request that vLLM's next calls concern. They give its id only; our scheduler
            sets the request before each of them.
        rows: state of each row, by request id; just of the requests that hold blocks.
        crossing: those of them that hold reserved blocks.
        waiting_round: the first request whose round waits for room in this step.
        by_priority: whether less important requests are preempted first.
        prefixes: cached compressed prefixes.
        others: KV cache groups that are not compressed.
        unconfirmed: compressions that the workers have not yet reported on.
        drops_last_block: whether a draft's KV pair of a block's last token depends on the token
            after it, so that the last block that is found must be computed anew.
    """

    drops_last_block = False
    by_priority = False
    waiting_round: Request | None = None

    def __init__(self, kv_cache_spec: CompressionTerms, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._recorder = SchedulerRecorder(kv_cache_spec.metrics_directory)
        self.prefixes = CompressedPrefixCache(
            self.block_pool, self.kv_cache_group_id, kv_cache_spec.reuse, self._recorder
        )
        self.unconfirmed = UnconfirmedRuns(self.prefixes, self._recorder)
        self.request: Request | None = None
        self.rows: dict[str, RowState] = {}
        self.crossing: dict[str, RowState] = {}
        self._has_whole_hashes = self.block_size == self.block_pool.hash_block_size
        self.others = OtherGroups(self.prefixes, self.rows, kv_cache_spec.repeat is not None)
        self.share_pool(self.block_pool.num_gpu_blocks, kv_cache_spec.block_bytes)
        self._changed: list[RowState] = []  # in the step that is being scheduled
        self._last_hit: tuple[Request, PrefixRun] | None = None  # of the last prefix cache lookup

    def share_pool(self, num_blocks: int, block_bytes: int) -> None:
        """Tell how much of the pool is ours; must come before the first request.

        Args:
            num_blocks: of the pool, without those that the other groups need for one request.
            block_bytes: of a block, over all layers that it can hold and all ranks.
        """
        spec = self.kv_cache_spec
        self.rule = replace(spec.rule, pool_blocks=num_blocks)
        self._held = HeldBytes(self.block_pool, block_bytes, self._recorder)
        self._lookup = PrefixLookup(
            self.prefixes, self.rule, spec.reuse, self.others, self._null_block, spec.repeat
        )

    # What vLLM calls, in the order of a step.

    def new_step_starts(self) -> None:
        """Fold every row that is ready, before anybody asks for blocks.

        vLLM walks through the running requests in order and preempts the last one when blocks run
        out, which is often the one that has just completed its prompt.
        """
        super().new_step_starts()
        self.waiting_round = None
        for request_id, row in list(self.crossing.items()):
            request = row.request
            if row.can_fold(request.num_computed_tokens - request.num_in_flight_tokens):
                self._fold(request_id, row)

    def longest_hit(
        self, vllms: Callable[..., Any], block_hashes: Sequence[Any], max_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """The raw or the compressed prefix that serves most of the request's context.

        A compressed hit begins a folded row: ``[n' compressed][null ...][dense tail ...]``.

        Args:
            vllms: looks for a raw prefix in all KV cache groups.
            block_hashes: vLLM's hashes of the request's blocks.
            max_length: the most tokens that may be found.

        Returns:
            as vLLM's lookup: blocks by group, their tokens, and how many more some group has.
        """
        self._last_hit, request = None, self.request
        assert request is not None
        raw = vllms(block_hashes, self._lookup.most_raw_tokens(request, max_length))
        by_group, raw_tokens, *_ = raw
        hit = self._lookup.find(
            request, block_hashes, max_length, raw_tokens, drops_last=self.drops_last_block
        )
        if hit is None:
            return raw
        self._last_hit = (request, hit.run)
        blocks = {**hit.of_others, self.kv_cache_group_id: hit.blocks}
        found = tuple(blocks[group_id] for group_id in range(len(by_group)))
        return found, len(hit.blocks) * self.block_size, hit.num_lagging_tokens

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, *args: Any, **kwargs: Any
    ) -> None:
        """Fold the row and free blocks, once the prefix is processed."""
        row = self.crossing.get(request_id)
        if row is not None and row.can_fold(processed_computed_tokens):
            self._fold(request_id, row)

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
        """vLLM's count, and the blocks to reserve for the compressed prefix."""
        row = self.rows.get(request_id)
        if row is not None and num_tokens_main_model < row.busy_from:
            if not new_computed_blocks and not apply_admission_cap:
                # vLLM's count of a running request, without asking it: most calls are these.
                missing = num_tokens - len(self.req_to_blocks[request_id]) * self.block_size
                return 0 if missing <= 0 else -(-missing // self.block_size)
        elif row is None:  # the row that it would begin
            if self.waiting_round is not None:
                return int(self.block_pool.num_gpu_blocks)  # so many are never free
            request, run = self._introduced(request_id), self.prefixes.owner(new_computed_blocks)
            row = new_row(self.rule, request, self._next_plan(request, run))
        num_reserved = row.num_reserved_blocks(num_tokens_main_model)
        if apply_admission_cap and num_reserved:
            num_tokens = up_to_first_crossing(self, row, num_tokens)
        count: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens + num_reserved * self.block_size,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            **kwargs,
        )
        return blocks_to_admit(self, row, count) if apply_admission_cap else count

    def add_local_computed_blocks(
        self, request_id: str, new_computed_blocks: Sequence[KVCacheBlock], *args: Any, **kw: Any
    ) -> None:
        """Begin a row with what was found in the prefix cache, raw or compressed."""
        super().add_local_computed_blocks(request_id, new_computed_blocks, *args, **kw)
        run = self.prefixes.owner(new_computed_blocks)
        row = self._begin_row(request_id, run)
        if run is None:
            row.num_found_raw_tokens = len(new_computed_blocks) * self.block_size
            return
        row.start_from(run)
        self._changed.append(row)
        self._use(run)
        self.unconfirmed.joined(run, row.request)
        self._recorder.prefix_hit(run.plan.boundary_tokens)

    def allocate_external_computed_blocks(
        self, request_id: str, num_local: int, num_external: int, *args: Any, **kw: Any
    ) -> None:
        """Blocks that a KV connector fills."""
        known = len(self.req_to_blocks[request_id])
        super().allocate_external_computed_blocks(request_id, num_local, num_external, *args, **kw)
        self.prefixes.blocks_taken(self.req_to_blocks[request_id][known:])
        self.rows[request_id].loads(num_local, num_external)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for the next tokens; in the crossing step the reserve follows them in the row."""
        row = self.rows.get(request_id) or self._begin_row(request_id)
        if num_tokens_main_model < row.busy_from and not self._partial_hit_reqs:
            if num_tokens <= len(self.req_to_blocks[request_id]) * self.block_size:
                return []
        elif row.reservation is not None:
            num_tokens += len(row.reservation.run.blocks) * self.block_size
        blocks = list(super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))
        if row.crosses(num_tokens_main_model):
            blocks += self._reserve(request_id, row, num_tokens_main_model)
        self.prefixes.blocks_taken(blocks)
        return blocks

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish raw prompt blocks as vLLM does, and dense blocks under keys of the row's run."""
        row = self.rows[request.request_id]
        first = self.num_cached_block.get(request.request_id, 0)
        if num_tokens // self.block_size <= first and self._has_whole_hashes:
            return
        if row.num_raw_tokens is not None:
            num_tokens = min(num_tokens, request.num_prompt_tokens, row.num_raw_tokens)
        elif row.run is not None:
            row_blocks = self.req_to_blocks[request.request_id]
            self.num_cached_block[request.request_id] = self.prefixes.cache_tail(
                row.run, request.block_hashes, row_blocks, first, row.most_tail_tokens(num_tokens)
            )
            return
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """End the row (the request ends, is aborted or preempted) and hand over its blocks."""
        row = self.rows.pop(request_id, None)
        if row is not None:
            self.crossing.pop(request_id, None)
            is_due = row.reservation is not None and not row.reservation.run.plan.is_round
            if is_due and row.request.is_finished():
                self._recorder.skipped("ended_before_decode")
            if row.run is not None:
                self._stop_using(row.run)
        return list(super().pop_blocks_for_free(request_id))

    # What our scheduler calls.

    def hit_of(self, request: Request) -> PrefixRun | None:
        """The compressed prefix that the last lookup found, where it was this request's."""
        hit = self._last_hit
        return hit[1] if hit is not None and hit[0] is request else None

    def plan_ahead(self, request: Request) -> tuple[PrefixPlan | None, bool]:
        """What a request compresses next, and whether its row must fold once before that.

        Args:
            request: it runs; or it waits, and its lookup in the prefix cache was the last one.
        """
        row = self.rows.get(request.request_id)
        if row is None:
            return self._next_plan(request, self.hit_of(request)), False
        if row.reservation is not None:
            return self._next_plan(request, row.reservation.run), True
        return row.plan, False

    def end_of_schedule(
        self, scheduled: Container[str], repeats: dict[str, int] | None = None
    ) -> StepPrefixes | None:
        """Publish what the scheduled step completes; see :func:`publish_step`."""
        self._held.report()
        changed, self._changed = self._changed, []
        rows = [row for row in changed if self.rows.get(row.request.request_id) is row]
        return publish_step(rows, scheduled, self.prefixes, self.unconfirmed, repeats or {})

    def settle(self, outcomes: Mapping[int, Outcome]) -> dict[Request, str]:
        """Take in what became of compressions, and give back what they reserved in vain.

        Args:
            outcomes: by serial of the run.

        Returns:
            see :meth:`UnconfirmedRuns.settle`.
        """
        for run, (num_blocks, estimated_loss) in self.unconfirmed.fits(outcomes):
            self._shrink(run, run.plan.fitted(num_blocks, estimated_loss))
        return self.unconfirmed.settle(outcomes)

    def outcome(self, request: Request) -> dict[str, Any]:
        """What became of a request's prompt, as plain values for its client.

        Must be called while the request has its row.

        Returns:
            what :meth:`PrefixPlan.as_told` says of a folded row, or ``left_alone`` with one of
            ``metrics.SKIP_REASONS``.
        """
        row = self.rows.get(request.request_id)
        if row is not None and row.run is not None:
            return row.run.plan.as_told()
        return {"left_alone": self._skip_reason(request) or "ended_before_decode"}

    def is_compressed(self, run: PrefixRun) -> bool:
        """Whether the workers have said that they compressed a run."""
        return run not in self.unconfirmed

    def close(self) -> None:
        """The engine ends: its metrics no longer count what it held."""
        self._recorder.close()

    def _introduced(self, request_id: str) -> Request:
        """The request whose id vLLM gives, which our scheduler has set before the call."""
        request = self.request
        assert request is not None and request.request_id == request_id
        return request

    def _next_plan(self, request: Request, run: PrefixRun | None) -> PrefixPlan | None:
        """The compression after ``run``; the first compression where ``run`` is None."""
        about = request.num_prompt_tokens, options(request)
        return self.rule.next_plan(*about, None if run is None else run.plan)

    def _skip_reason(self, request: Request) -> str | None:
        return self.rule.skip_reason(request.num_prompt_tokens, options(request))

    def _begin_row(self, request_id: str, run: PrefixRun | None = None) -> RowState:
        """The state of a new row, which begins with ``run`` or with raw blocks."""
        request = self._introduced(request_id)
        row = self.rows[request_id] = new_row(self.rule, request, self._next_plan(request, run))
        reason = self._skip_reason(request) if run is None else None
        if reason and reason not in FAILURES:  # failures are counted when they happen
            self._recorder.skipped(reason)
        return row

    def _reserve(self, request_id: str, row: RowState, num_tokens: int) -> list[KVCacheBlock]:
        """Put blocks for the next compressed prefix at the end of the row, and return them.

        ``num_tokens``: computed tokens of the request once the step has run.
        """
        plan = row.plan
        assert plan is not None
        blocks: list[KVCacheBlock] = self.block_pool.get_new_blocks(plan.num_compressed_blocks)
        prefix_hash = None
        if self.enable_caching:
            prefix_hash = self._lookup.shared_hash(row.request, plan, row.num_found_raw_tokens)
        row_blocks = self.req_to_blocks[request_id]
        row.reserve(Reservation(len(row_blocks), PrefixRun(plan, blocks, prefix_hash), num_tokens))
        row_blocks.extend(blocks)
        self.crossing[request_id] = row
        self._changed.append(row)
        return blocks

    def _fold(self, request_id: str, row: RowState) -> None:
        """Let the row begin with its reserved blocks; give back the blocks that they replace."""
        reservation, earlier = row.reservation, row.run
        assert reservation is not None
        del self.crossing[request_id]
        run = reservation.run
        row_blocks = self.req_to_blocks[request_id]
        replaced = row_blocks[: run.plan.num_prefix_blocks]
        row_blocks[:] = fold_row(row_blocks, run.plan, reservation.start, self._null_block)
        if earlier is not None:
            self._stop_using(earlier)
        self.block_pool.free_blocks(block for block in reversed(replaced) if not block.is_null)
        self.unconfirmed.folded(run, row.request.num_prompt_tokens, self.rule.block_size)
        self._use(run)
        row.fold(self._next_plan(row.request, run))

    def _shrink(self, run: PrefixRun, plan: PrefixPlan) -> None:
        """A run needs fewer blocks than it has; the workers have written nothing into the others
        that anybody reads.
        """
        for request_id, row in list(self.crossing.items()):
            if row.reservation is not None and row.reservation.run is run:
                self._fold(request_id, row)
        if run.users:
            self._held.add(run.plan, -1)
            self._held.add(plan, 1)
        unused = self.prefixes.shrink(run, plan)
        places = slice(len(run.blocks), len(run.blocks) + len(unused))
        for request_id, row in self.rows.items():
            if row.run is run:
                nulls = [self._null_block] * len(unused)
                self.req_to_blocks[request_id][places] = nulls
                self.block_pool.free_blocks(reversed(unused))

    def _use(self, run: PrefixRun) -> None:
        """One more row begins with the run."""
        run.users += 1
        self.prefixes.used(run)
        if run.users == 1:
            self._held.add(run.plan, 1)

    def _stop_using(self, run: PrefixRun) -> None:
        """One row less begins with the run."""
        run.users -= 1
        self.prefixes.used(run)
        if run.users == 0:
            self._held.add(run.plan, -1)
