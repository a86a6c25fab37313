"""Worker side: the compressed prefixes of running requests, and what each step does with them.

One :class:`HeadPageRuntime` lives in each worker. The worker tells it of every step before and
after vLLM runs it; the attention builder asks it which rows of the batch are compressed.

A prefix that was completed in one step is compressed at the start of the next one. The first
output token is not delayed by it, and a request that ends with its first token is compressed only
when the scheduler keeps its prefix for later requests. This is safe although the blocks may already
have been given to somebody else: a worker runs its steps in order, and nothing is written before
the compaction at the start of the step.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvzip.head_pages import fold_row
from vllm_kvzip.vllm_bridge.batches import PrefixState, QuerySpan
from vllm_kvzip.vllm_bridge.fp8_cache import queries_of_model
from vllm_kvzip.vllm_bridge.requests import checksum
from vllm_kvzip.vllm_bridge.step_message import attached
from vllm_kvzip.vllm_bridge.use_times import UseTimes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_kvzip.clocks import Clock, Stopwatch
    from vllm_kvzip.core import CompressedPrefix, PrefixPlan
    from vllm_kvzip.pipeline import Compressor
    from vllm_kvzip.vllm_bridge.attention_timer import AttentionTimer
    from vllm_kvzip.vllm_bridge.batches import Batcher, SplitBatch
    from vllm_kvzip.vllm_bridge.head_page_cache import HeadPageCache
    from vllm_kvzip.vllm_bridge.requests import RequestTracker, TrackedRequest
    from vllm_kvzip.vllm_bridge.runners import Rows
    from vllm_kvzip.vllm_bridge.scoring_pass import ReconstructionPass
    from vllm_kvzip.vllm_bridge.stats_export import WorkerRecorder

_NULL_BLOCK = 0


@dataclass(frozen=True)
class KeptRun:
    """A compressed prefix that later requests may start from."""

    prefix: CompressedPrefix
    plan: PrefixPlan
    seed: int


@dataclass
class Step:
    """What the attention builder must do in one step.

    Attributes:
        batch: compressed and other requests; None when nobody is compressed.
        spans: queries to hand to the scorer.
    """

    batch: SplitBatch | None
    spans: tuple[QuerySpan, ...]


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
        clock: measures the work of the device.
        reconstruction: runs the model over a context once more, for scorers that want it.
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
        clock: Clock,
        reconstruction: ReconstructionPass | None = None,
        ttl_seconds: float | None = None,
    ) -> None:
        self._uses = UseTimes(ttl_seconds)
        self._clock = clock
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
        self._reconstruction = reconstruction
        self._states: dict[str, PrefixState] = {}
        self._runs: dict[int, KeptRun] = {}
        self._pending: list[TrackedRequest] = []
        self._quantized: set[int] = set()  # blocks that were filled with quantized pages
        self._observed: dict[str, dict[int, list[torch.Tensor]]] = {}
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
        if pending:
            gone = self._tracker.finished(output) | self._tracker.suspended(output)
            self._compress(
                [r for r in pending if r.kept_as is not None or r.request_id not in gone]
            )
        for request_id in self._tracker.drop_ended(output):
            self._forget(request_id)
        self._uses.step()
        runs: dict[str, KeptRun] = {}
        if (message := attached(output)) is not None:
            for serial in message.dropped:
                self._runs.pop(serial, None)
                self._uses.drop(serial)
            for request_id, serial in message.hits.items():
                self._uses.starts(request_id, serial)
            runs = {rid: self._runs[serial] for rid, serial in message.hits.items()}
        plans = {rid: run.plan for rid, run in runs.items()}
        self._tracker.advance(output, plans)
        self._clean_blocks(output, plans)
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
            rows = query[span.start : span.end].clone()
            by_layer[index].append(queries_of_model(layer, rows, dtype))

    def describe_step(self, common: CommonAttentionMetadata) -> Step | None:
        """Split the batch into compressed and other requests; None when vLLM's path serves all.

        Args:
            common: vLLM's metadata of the batch.
        """
        request_ids = self._rows.request_ids(common)
        spans = tuple(self._spans(request_ids, common.query_start_loc_cpu))
        batch = self._batcher.split(request_ids, common, self._states)
        return Step(batch, spans) if batch or spans else None

    def _compress(self, requests: list[TrackedRequest]) -> None:
        """Compress prefixes that are complete; the model repeats all of them in common passes."""
        if self._reconstruction is None or not requests:
            for request in requests:
                self._recorded_later(self._compress_one(request, None))
            return
        prefixes = []
        for request in requests:
            assert request.plan is not None
            blocks = request.block_ids[: request.plan.num_prefix_blocks]
            prefixes.append((request.token_ids, blocks))
        begin = self._clock.mark()
        scored = self._reconstruction.run(prefixes)
        end = self._clock.mark()
        for request, (scores, share) in zip(requests, scored, strict=True):
            stages = self._compress_one(request, scores)
            stages.add("score", begin, end, share)
            self._recorded_later(stages)

    def _compress_one(
        self, request: TrackedRequest, reconstruction: torch.Tensor | None
    ) -> Stopwatch:
        plan = request.plan
        assert plan is not None
        row = request.block_ids
        compressed_blocks = row[request.reserve_start :][: plan.num_compressed_blocks]
        observed = self._observed.pop(request.request_id, None)
        prefix, stages = self._compressor.compress(
            source_blocks=row[plan.start_blocks : plan.num_prefix_blocks],
            target_blocks=compressed_blocks,
            plan=plan,
            observation_queries=self._observation_queries(observed),
            reconstruction=reconstruction,
            scale=self._scale,
            seed=request.seed,
            earlier=self._states[request.request_id].prefix if plan.start_blocks else None,
        )
        self._tracker.folded(request, fold_row(row, plan, request.reserve_start, _NULL_BLOCK))
        if plan.num_quantized_blocks:
            self._quantized.update(compressed_blocks[plan.num_full_blocks :])
        self._rows.replace_row(request.request_id, request.block_ids)
        self._states[request.request_id] = PrefixState(prefix, plan)
        if request.kept_as is not None:
            self._runs[request.kept_as] = KeptRun(prefix, plan, request.seed)
            self._uses.starts(request.request_id, request.kept_as)
        return stages

    def _clean_blocks(self, output: SchedulerOutput, hits: Mapping[str, PrefixPlan]) -> None:
        """Put zeros into blocks that held quantized pages and are handed out anew.

        Read as numbers, quantized bytes can be NaN, and an attention kernel may multiply what lies
        behind a sequence's last token by zero instead of leaving it alone.

        Args:
            output: the step.
            hits: plans of requests whose rows begin with a compressed prefix.
        """
        if not self._quantized:
            return
        dirty = []
        for rid, blocks in self._tracker.new_blocks(output):
            fresh = blocks[hits[rid].num_compressed_blocks :] if rid in hits else blocks
            dirty += [block for block in fresh if block in self._quantized]
        if dirty:
            self._quantized.difference_update(dirty)
            pages = self._cache.pool.page_ids(torch.tensor(dirty)).flatten()
            self._cache.pages.index_fill_(0, async_tensor_h2d(pages, self._cache.pages.device), 0)

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
        """Kept queries as ``[W, H, G, D]`` float32 per layer."""
        if not observed:
            return None
        geometry = self._cache.geometry
        shape = (-1, geometry.num_kv_heads, geometry.group_size, geometry.head_dim)
        return [
            torch.cat(observed[layer]).view(shape).float() for layer in range(geometry.num_layers)
        ]

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
