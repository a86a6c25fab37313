"""Worker side: the compressed prefixes of running requests, and what each step does with them.

One :class:`HeadPageRuntime` lives in each worker. The worker tells it of every step before and
after vLLM runs it; the attention builder asks it which rows of the batch are compressed.

A prefix that was completed in one step is compressed at the start of the next one. The first
output token is not delayed by it, and a request that ends with its first token is compressed only
when the scheduler keeps its prefix for later requests. This is safe although the blocks may already
have been given to somebody else: a worker runs its steps in order, and nothing is written before
the compaction at the start of the step.

Whatever fails while a prefix is compressed concerns its request alone. Its row is folded like any
other, because the scheduler has folded it, and vLLM's own path attends over whatever lies there.
The scheduler is told, and takes the step's output back (:mod:`vllm_kvzip.vllm_bridge.outcomes`).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.errors import NotFiniteError
from vllm_kvzip.planning.prefix_seed import checksum
from vllm_kvzip.storage.head_pages import fold_row
from vllm_kvzip.vllm_bridge.attention.batches import BatchWork, PrefixState, QuerySpan
from vllm_kvzip.vllm_bridge.fp8_cache import queries_of_model
from vllm_kvzip.vllm_bridge.outcomes import (
    FAILED,
    NOT_FINITE,
    WorkerOutcomes,
    log_failure,
)
from vllm_kvzip.vllm_bridge.step_message import attached
from vllm_kvzip.vllm_bridge.symbols import async_tensor_h2d
from vllm_kvzip.vllm_bridge.worker.use_times import UseTimes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_kvzip.clocks import Stopwatch
    from vllm_kvzip.core import CompressedPrefix, PrefixPlan
    from vllm_kvzip.pipeline import Compressor
    from vllm_kvzip.vllm_bridge.attention.attention_timer import AttentionTimer
    from vllm_kvzip.vllm_bridge.attention.batches import Batcher
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
    from vllm_kvzip.vllm_bridge.stats_export import WorkerRecorder
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata, SchedulerOutput
    from vllm_kvzip.vllm_bridge.worker.repeats import Repeated, Repeats
    from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker, TrackedRequest
    from vllm_kvzip.vllm_bridge.worker.runners import Rows

_NULL_BLOCK = 0


@dataclass(frozen=True)
class KeptRun:
    """A compressed prefix that later requests may start from."""

    prefix: CompressedPrefix
    plan: PrefixPlan
    seed: int


class HeadPageRuntime:
    """Compresses prompts and describes steps; see the module docstring.

    Args:
        cache: what is compressed.
        compressor: score, budget, select, compact.
        batcher: describes batches to the attention kernel.
        tracker: requests to compress.
        rows: adapter of vLLM's model runner.
        recorder: metrics of this worker; None where another rank records the same.
        timer: of attention; likewise.
        observation_window_tokens: how many of the last prompt queries the scorer wants (0: none).
        scale: softmax scale of the attention layers.
        repeats: lets the model repeat contexts, for scorers that want it.
        ttl_seconds: how long an unused prefix lives.
    """

    def __init__(
        self,
        *,
        cache: HeadPageCache,
        compressor: Compressor,
        batcher: Batcher,
        tracker: RequestTracker,
        rows: Rows,
        recorder: WorkerRecorder | None,
        timer: AttentionTimer | None,
        observation_window_tokens: int,
        scale: float,
        repeats: Repeats | None = None,
        ttl_seconds: float | None = None,
    ) -> None:
        self._uses = UseTimes(ttl_seconds)
        self.outcomes = WorkerOutcomes(cache.pages.device)
        self._unrecorded: list[Stopwatch] = []
        self._cache = cache
        self._batcher = batcher
        self._compressor = compressor
        self._tracker = tracker
        self._rows = rows
        self._recorder = recorder
        self._timer = timer
        self._window = observation_window_tokens
        self._scale = scale
        self.repeats = repeats
        self._states: dict[str, PrefixState] = {}
        self._runs: dict[int, KeptRun] = {}
        self._pending: list[TrackedRequest] = []
        self._dirty: set[int] = set()  # blocks that may hold NaN
        self._not_finite: set[str] = set()  # requests that go on writing some
        self._observed: dict[str, dict[int, list[torch.Tensor]] | None] = {}  # None: it failed
        self._spans_by_request: dict[str, tuple[int, int]] = {}

    @property
    def has_work(self) -> bool:
        """Whether any request of this step may need more than vLLM's own path."""
        return bool(self._states or self._spans_by_request)

    def cached_prefixes(self) -> list[dict[str, Any]]:
        """Compressed prefixes that later requests can start from, as of the last step.

        Returns:
            for each, plain values for a client: ``id`` (a checksum of its tokens), tokens covered,
            blocks held, blocks before compression, and the ratio of the two.
        """
        return [
            {
                "id": checksum(run.seed),
                "compressed_tokens": run.plan.boundary_tokens,
                "blocks_held": run.plan.num_compressed_blocks,
                "blocks_before": run.plan.num_prefix_blocks,
                "keep_ratio": run.plan.num_compressed_blocks / run.plan.num_prefix_blocks,
            }
            for serial, run in self._runs.items()
            if not self._uses.is_over(serial)
        ]

    def before_step(self, output: SchedulerOutput) -> None:
        """Compress what the last step completed, drop what ended, prepare this step."""
        pending, self._pending = self._pending, []
        gone = self._tracker.finished(output) | self._tracker.suspended(output) if pending else ()
        wanted = [r for r in pending if r.kept_as is not None or r.request_id not in gone]
        message = attached(output)
        if self.repeats is not None:
            due: list[tuple[TrackedRequest, int | None]] = [(request, None) for request in wanted]
            for rid, count in message.repeats.items() if message else ():
                if (waiting := self._tracker.get(rid)) is not None:
                    due.append((waiting, count))
            self.repeats.go_on(due)
        if pending:
            for request in pending:
                if request.serial is not None:
                    self.outcomes.add(request.serial, None)
            self._compress(wanted)
            self.outcomes.settle()
        for request_id in self._tracker.drop_ended(output):
            self._forget(request_id)
        self._uses.step()
        runs: dict[str, KeptRun] = {}
        broken: Iterable[str] = ()  # start from a prefix that could not be compressed
        if message is not None:
            for serial in message.dropped:
                self._runs.pop(serial, None)
                self._uses.drop(serial)
            for rid in message.left_alone:
                self._tracker.forget(rid)
            found = {rid: self._runs.get(serial) for rid, serial in message.hits.items()}
            runs = {rid: run for rid, run in found.items() if run is not None}
            for rid in runs:
                self._uses.starts(rid, message.hits[rid])
            broken = found.keys() - runs.keys()
        plans = {rid: run.plan for rid, run in runs.items()}
        self._tracker.advance(output, plans)
        self._clean_blocks(output)
        for rid in broken:
            self._tracker.forget(rid)
        for request_id, run in runs.items():
            self._states[request_id] = PrefixState(run.prefix, run.plan)
        self._spans_by_request = self._plan_observation(output) if self._window else {}
        if self._timer is not None:
            self._timer.step_starts(output)
        self._record_finished()

    def after_step(self, output: SchedulerOutput) -> None:
        """Note whose prefix this step completed."""
        if self._timer is not None:
            self._timer.step_ends()
        message = attached(output)
        for request in self._tracker.crossing(output):
            request.kept_as = message.kept.get(request.request_id) if message else None
            request.serial = message.reserved.get(request.request_id) if message else None
            self._pending.append(request)

    def observe(
        self, layer: Any, query: torch.Tensor, spans: tuple[QuerySpan, ...], dtype: torch.dtype
    ) -> None:
        """Keep the queries of one layer for the scorer.

        Args:
            layer: vLLM's.
            query: ``[num_tokens, H * G, D]``.
            spans: which rows belong to whom.
            dtype: of the model.
        """
        index = self._cache.layer_index[layer.layer_name]
        for span in spans:
            by_layer = self._observed.setdefault(span.request_id, defaultdict(list))
            if by_layer is None:
                continue
            try:
                rows = query[span.start : span.end].clone()
                by_layer[index].append(queries_of_model(layer, rows, dtype))
            except Exception as error:  # its prefix will not be compressed
                self._observed[span.request_id] = None
                log_failure(span.request_id, error)

    def describe_step(self, common: CommonAttentionMetadata) -> BatchWork | None:
        """Split the batch into compressed and other requests; None when vLLM's path serves all.

        Args:
            common: vLLM's metadata of the batch.
        """
        request_ids = self._rows.request_ids(common)
        spans = tuple(self._spans(request_ids, common.query_start_loc_cpu))
        batch = self._batcher.split(request_ids, common, self._states)
        return BatchWork(batch, spans) if batch or spans else None

    def _compress(self, requests: list[TrackedRequest]) -> None:
        """Compress prefixes that are complete."""
        for request in requests:
            assert request.plan is not None
            row, plan = request.block_ids, request.plan
            first_quantized = request.reserve_start + plan.num_full_blocks
            end = request.reserve_start + plan.num_compressed_blocks
            self._dirty.update(row[first_quantized:end])  # also where only some are filled
            prefix = self._attempt(request)
            self._tracker.folded(request, fold_row(row, plan, request.reserve_start, _NULL_BLOCK))
            self._rows.replace_row(request.request_id, request.block_ids)
            if prefix is None:
                self._forget(request.request_id)
                self._tracker.forget(request.request_id)
                continue
            self._states[request.request_id] = PrefixState(prefix, plan)
            if request.kept_as is not None:
                self._runs[request.kept_as] = KeptRun(prefix, plan, request.seed)
                self._uses.starts(request.request_id, request.kept_as)

    def _attempt(self, request: TrackedRequest) -> CompressedPrefix | None:
        """Compress one prefix and note what became of it; None when it could not be."""
        outcome: str | torch.Tensor | None
        prefix = None
        repeated = self.repeats.take(request.request_id) if self.repeats else None
        try:
            if self.repeats is not None and repeated is None:
                outcome = FAILED
            else:
                prefix, stages = self._compress_one(request, repeated)
                outcome = prefix.sound
                self._recorded_later(stages)
        except NotFiniteError:
            outcome = NOT_FINITE
            self._not_finite.add(request.request_id)
            self._dirty.update(block for block in request.block_ids if block != _NULL_BLOCK)
        except Exception as error:
            log_failure(request.request_id, error)
            outcome = FAILED
        if request.serial is not None:
            self.outcomes.add(request.serial, outcome)
        return prefix

    def _compress_one(
        self, request: TrackedRequest, repeated: Repeated | None
    ) -> tuple[CompressedPrefix, Stopwatch]:
        plan, row = request.plan, request.block_ids
        assert plan is not None
        observed = self._observed.pop(request.request_id, None)
        prefix, stages = self._compressor.compress(
            source_blocks=row[plan.start_blocks : plan.num_prefix_blocks],
            target_blocks=row[request.reserve_start :][: plan.num_compressed_blocks],
            plan=plan,
            observation_queries=self._observation_queries(observed),
            reconstruction=repeated.scores if repeated else None,
            scale=self._scale,
            seed=request.seed,
            earlier=self._states[request.request_id].prefix if plan.start_blocks else None,
        )
        if repeated is not None:
            repeated.record(stages)
        return prefix, stages

    def _clean_blocks(self, output: SchedulerOutput) -> None:
        """Put zeros into blocks that may hold NaN and are handed out anew.

        Read as numbers, quantized bytes can be NaN, and so can be what a broken prompt left. An
        attention kernel may multiply what lies behind a sequence's last token by zero instead of
        leaving it alone.
        """
        self._not_finite -= self._tracker.finished(output)
        if not self._dirty and not self._not_finite:
            return
        given = list(self._tracker.new_blocks(output))
        dirty = [block for _, blocks in given for block in blocks if block in self._dirty]
        if dirty:
            self._dirty.difference_update(dirty)
            pages = self._cache.pool.page_ids(torch.tensor(dirty)).flatten()
            self._cache.pages.index_fill_(0, async_tensor_h2d(pages, self._cache.pages.device), 0)
        for rid, blocks in given:
            if rid in self._not_finite:
                self._dirty.update(blocks)

    def _recorded_later(self, stages: Stopwatch) -> None:
        """Record how long a compression took, as soon as the device is through with it."""
        if self._recorder is not None:
            self._unrecorded.append(stages)
            self._record_finished()

    def _record_finished(self) -> None:
        while self._unrecorded and self._unrecorded[0].finished:
            assert self._recorder is not None
            self._recorder.compressed(self._unrecorded.pop(0).seconds())

    def _observation_queries(
        self, observed: dict[int, list[torch.Tensor]] | None
    ) -> list[torch.Tensor] | None:
        """Kept queries as ``[W, H, G, D]`` per layer."""
        if not observed:
            return None
        geometry = self._cache.geometry
        shape = (-1, geometry.num_kv_heads, geometry.group_size, geometry.head_dim)
        return [torch.cat(observed[layer]).view(shape) for layer in range(geometry.num_layers)]

    def _plan_observation(self, output: SchedulerOutput) -> dict[str, tuple[int, int]]:
        """Tokens of each request's chunk whose queries the scorer shall see.

        Those are the context's last tokens. A request can find its whole context and more in the
        prefix cache; then the first tokens behind it must do.
        """
        spans: dict[str, tuple[int, int]] = {}
        for rid, num_scheduled in output.num_scheduled_tokens.items():
            request = self._tracker.get(rid)
            if request is None or request.crossed or request.plan is None:
                continue
            to_end = request.plan.ready_tokens - request.num_computed_tokens
            if to_end <= 0:
                spans[rid] = (0, min(num_scheduled, self._window))
            elif to_end - self._window < num_scheduled:
                spans[rid] = (max(0, to_end - self._window), min(num_scheduled, to_end))
        return spans

    def _spans(self, request_ids: list[str], starts: torch.Tensor) -> list[QuerySpan]:
        if not self._spans_by_request:
            return []
        first_rows = starts.tolist()
        return [
            QuerySpan(rid, first_rows[row] + span[0], first_rows[row] + span[1])
            for row, rid in enumerate(request_ids)
            if (span := self._spans_by_request.get(rid)) is not None
        ]

    def _forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)
        self._uses.ends(request_id)
        self._observed.pop(request_id, None)
        if self.repeats is not None:
            self.repeats.forget(request_id)
