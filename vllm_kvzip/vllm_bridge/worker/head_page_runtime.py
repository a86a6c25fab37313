"""Worker side: what each step does with the compressed prefixes of requests.

One :class:`HeadPageRuntime` lives in each worker. The worker tells it of every step before and
after vLLM runs it; the attention builder asks it which rows of the batch are compressed.

A prefix that was completed in one step is compressed at the start of the next one. The first
output token is not delayed by it, and a request that ends with its first token is compressed only
when the scheduler keeps its prefix for later requests. This is safe although the blocks may already
have been given to somebody else: a worker runs its steps in order, and nothing is written before
the compaction at the start of the step.

The row of a request whose compression failed is folded like any other, because the scheduler has
folded it. vLLM's own path then attends over whatever these blocks hold; the scheduler is told, and
takes the output of that step back (:mod:`vllm_kvzip.vllm_bridge.outcomes`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.storage.head_pages import fold_row
from vllm_kvzip.vllm_bridge.attention.batches import QuerySpan, StepDescription
from vllm_kvzip.vllm_bridge.compressed_group import NULL_BLOCK
from vllm_kvzip.vllm_bridge.step_message import StepPrefixes, attached

if TYPE_CHECKING:
    from collections.abc import Collection

    import torch

    from vllm_kvzip.vllm_bridge.attention.attention_timer import AttentionTimer
    from vllm_kvzip.vllm_bridge.attention.batches import Batcher, SplitBatch
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
    from vllm_kvzip.vllm_bridge.cache.unclean_blocks import UncleanBlocks
    from vllm_kvzip.vllm_bridge.contexts.kept_records import KeptRecords
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata, SchedulerOutput
    from vllm_kvzip.vllm_bridge.worker.compression import PrefixCompression
    from vllm_kvzip.vllm_bridge.worker.context_pages import ContextPages
    from vllm_kvzip.vllm_bridge.worker.observation import QueryObservation
    from vllm_kvzip.vllm_bridge.worker.prefixes import WorkerPrefixes
    from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker, TrackedRequest
    from vllm_kvzip.vllm_bridge.worker.runners import Rows


class HeadPageRuntime:
    """Puts compressions between steps and describes steps; see the module docstring.

    Args:
        cache: what is compressed.
        tracker: requests to compress.
        rows: adapter of vLLM's model runner.
        batcher: describes batches to the attention kernel.
        prefixes: that have been compressed.
        observation: queries for scorers that want them.
        compression: compresses one prefix.
        unclean: blocks that may hold NaN.
        timer: of attention; None where another rank records the same.
        contexts: reads and writes prefixes that travel.
        records: which tokens were kept, of requests that somebody wants to see explained.

    Attributes:
        cache, prefixes, contexts, records: see above.
    """

    def __init__(
        self,
        *,
        cache: HeadPageCache,
        tracker: RequestTracker,
        rows: Rows,
        batcher: Batcher,
        prefixes: WorkerPrefixes,
        observation: QueryObservation,
        compression: PrefixCompression,
        unclean: UncleanBlocks,
        timer: AttentionTimer | None,
        contexts: ContextPages,
        records: KeptRecords,
    ) -> None:
        self.cache = cache
        self.prefixes = prefixes
        self.contexts = contexts
        self.records = records
        self._tracker = tracker
        self._rows = rows
        self._batcher = batcher
        self._observation = observation
        self._compression = compression
        self._unclean = unclean
        self._timer = timer
        self._complete: list[TrackedRequest] = []  # compressed at the start of the next step

    @property
    def has_work(self) -> bool:
        """Whether any request of this step may need more than vLLM's own path."""
        return bool(self.prefixes.states or self._observation.is_due)

    def before_step(self, output: SchedulerOutput) -> None:
        """Compress what the last step completed, drop what ended, prepare this step."""
        message = attached(output)
        self._compress_complete(output, message)
        for request_id in self._tracker.drop_ended(output):
            self._forget(request_id)
        self.prefixes.step()
        for serial in message.dropped:
            self.prefixes.drop(serial)
        for request_id in message.left_alone:
            self._tracker.forget(request_id)
        plans = self.prefixes.start(message.hits)
        self._tracker.advance(output, plans)
        self._unclean.clean(self._tracker.new_blocks(output), self._tracker.finished(output))
        for request_id in message.hits.keys() - plans.keys():  # its prefix could not be compressed
            self._tracker.forget(request_id)
        self._observation.plan_step(output, self._tracker)
        if self._timer is not None:
            self._timer.step_starts(output)
        self._compression.record_finished()

    def after_step(self, output: SchedulerOutput) -> None:
        """Note whose prefix this step completed."""
        if self._timer is not None:
            self._timer.step_ends()
        message = attached(output)
        self._compression.outcomes.order(message.reserved.values())
        for request in self._tracker.crossing(output):
            request.kept_as = message.kept.get(request.request_id)
            request.serial = message.reserved.get(request.request_id)
            request.kept_seed = message.seeds.get(request.request_id, request.seed)
            self._complete.append(request)

    def attach_outcomes(self, result: Any) -> Any:
        """Let what became of the compressions travel with the output of a step."""
        return self._compression.outcomes.attach(result)

    def describe_step(self, common: CommonAttentionMetadata) -> StepDescription | None:
        """Split the batch into compressed and other requests; None when vLLM's path serves all.

        Args:
            common: vLLM's metadata of the batch.
        """
        request_ids = self._rows.request_ids(common)
        spans = self._observation.spans(request_ids, common.query_start_loc_cpu)
        split = self._batcher.split(request_ids, common, self.prefixes.states)
        return StepDescription(split, spans) if split or spans else None

    def split(self, common: CommonAttentionMetadata) -> SplitBatch | None:
        """The batch in compressed and other requests; None when nobody is compressed.

        Args:
            common: vLLM's metadata of the batch.
        """
        return self._batcher.split(self._rows.request_ids(common), common, self.prefixes.states)

    def observe(
        self, layer: Any, query: torch.Tensor, spans: tuple[QuerySpan, ...], dtype: torch.dtype
    ) -> None:
        """Keep the queries of one layer for the scorer; see :meth:`QueryObservation.keep`."""
        self._observation.keep(layer, query, spans, dtype)

    def will_read(self, block_ids: Collection[int]) -> bool:
        """Whether the next step compresses what lies in one of some blocks.

        The scheduler may have given them away: see above.
        """
        return any(not set(due.block_ids).isdisjoint(block_ids) for due in self._complete)

    def _compress_complete(self, output: SchedulerOutput, message: StepPrefixes) -> None:
        """Compress what the last step completed, and repeat what later compressions need."""
        complete, self._complete = self._complete, []
        gone: set[str] = set()
        if complete:
            gone = self._tracker.finished(output) | self._tracker.suspended(output)
        wanted = [r for r in complete if r.kept_as is not None or r.request_id not in gone]
        due: list[tuple[TrackedRequest, int | None]] = [(request, None) for request in wanted]
        for request_id, count in message.repeats.items():
            if (waiting := self._tracker.get(request_id)) is not None:
                due.append((waiting, count))
        self._compression.repeat(due)
        for request in complete:
            if request.serial is not None:
                self._compression.outcomes.add(request.serial, None)
        for request in wanted:
            self._compress(request)
        self._compression.outcomes.settle()

    def _compress(self, request: TrackedRequest) -> None:
        """Compress one prefix, and fold the request's row."""
        row, plan = request.block_ids, request.plan
        assert plan is not None
        prefix = self._compression.compress(request)
        self._tracker.folded(request, fold_row(row, plan, request.reserve_start, NULL_BLOCK))
        self._rows.replace_row(request.request_id, request.block_ids)
        if prefix is None:
            self._forget(request.request_id)
            self._tracker.forget(request.request_id)
        else:
            self.prefixes.add(request, prefix.fitted or plan, prefix)

    def _forget(self, request_id: str) -> None:
        """A request has ended, lost its blocks, or could not be compressed."""
        self.prefixes.forget(request_id)
        self._compression.forget(request_id)
