"""Worker side: compress one complete prefix after the other, and note what became of each.

Whatever fails while a prefix is compressed concerns its request alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.errors import NotFiniteError
from vllm_kvzip.vllm_bridge.compressed_group import NULL_BLOCK
from vllm_kvzip.vllm_bridge.outcomes import FAILED, NOT_FINITE, log_failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vllm_kvzip.clocks import Stopwatch
    from vllm_kvzip.core import CompressedPrefix
    from vllm_kvzip.pipeline import Compressor
    from vllm_kvzip.vllm_bridge.cache.unclean_blocks import UncleanBlocks
    from vllm_kvzip.vllm_bridge.contexts.kept_records import KeptRecords
    from vllm_kvzip.vllm_bridge.outcomes import WorkerOutcomes
    from vllm_kvzip.vllm_bridge.stats_export import WorkerRecorder
    from vllm_kvzip.vllm_bridge.worker.observation import QueryObservation
    from vllm_kvzip.vllm_bridge.worker.prefixes import WorkerPrefixes
    from vllm_kvzip.vllm_bridge.worker.repeats import Repeated, Repeats
    from vllm_kvzip.vllm_bridge.worker.requests import TrackedRequest


class PrefixCompression:
    """Hands the compressor what it needs of each request.

    Args:
        compressor: score, budget, select, compact.
        scale: softmax scale of the attention layers.
        prefixes: what earlier compressions of a request kept.
        observation: queries for scorers that want them.
        repeats: lets the model repeat contexts, for scorers that want it; else None.
        unclean: blocks that may hold NaN.
        outcomes: what became of each compression.
        recorder: metrics of this worker; None where another rank records the same.
        records: of requests that somebody wants to see explained.
    """

    def __init__(
        self,
        *,
        compressor: Compressor,
        scale: float,
        prefixes: WorkerPrefixes,
        observation: QueryObservation,
        repeats: Repeats | None,
        unclean: UncleanBlocks,
        outcomes: WorkerOutcomes,
        recorder: WorkerRecorder | None,
        records: KeptRecords,
    ) -> None:
        self._compressor = compressor
        self._scale = scale
        self._prefixes = prefixes
        self._observation = observation
        self.repeats = repeats
        self._unclean = unclean
        self.outcomes = outcomes
        self._recorder = recorder
        self._records = records
        self._unrecorded: list[Stopwatch] = []

    def repeat(self, orders: Sequence[tuple[TrackedRequest, int | None]]) -> None:
        """Let the model repeat the next chunks of some prefixes; see :meth:`Repeats.go_on`."""
        if self.repeats is not None:
            self.repeats.go_on(orders)

    def compress(self, request: TrackedRequest) -> CompressedPrefix | None:
        """Compress one prefix and note what became of it; None when it could not be."""
        plan, row = request.plan, request.block_ids
        assert plan is not None
        if plan.num_quantized_blocks:  # also where only some are filled
            reserve = row[request.reserve_start :][: plan.num_compressed_blocks]
            self._unclean.add(reserve[plan.num_full_blocks :])
        outcome: str | torch.Tensor | None
        prefix = fit = None
        repeated = self.repeats.take(request.request_id) if self.repeats else None
        try:
            if self.repeats is not None and repeated is None:
                outcome = FAILED
            else:
                prefix, stages = self._compress_one(request, repeated)
                outcome = prefix.sound
                if (fitted := prefix.fitted) is not None:
                    assert fitted.estimated_loss is not None
                    fit = fitted.num_compressed_blocks, fitted.estimated_loss
                self._record_later(stages)
        except NotFiniteError:
            outcome = NOT_FINITE
            self._add_unclean(request)
        except Exception as error:
            log_failure(request.request_id, error)
            outcome = FAILED
            if plan.num_quantized_blocks:  # the next step reads what is written as numbers
                self._add_unclean(request)
        if request.serial is not None:
            self.outcomes.add(request.serial, outcome, fit)
        return prefix

    def _add_unclean(self, request: TrackedRequest) -> None:
        """What a request has written, and will write until it starts again, may be NaN."""
        self._unclean.add_request(request.request_id)
        self._unclean.add(block for block in request.block_ids if block != NULL_BLOCK)

    def forget(self, request_id: str) -> None:
        """Drop what was gathered for the compression of a request."""
        self._observation.forget(request_id)
        if self.repeats is not None:
            self.repeats.forget(request_id)

    def record_finished(self) -> None:
        """Record how long compressions took, of those that the device has finished."""
        while self._unrecorded and self._unrecorded[0].finished:
            assert self._recorder is not None
            self._recorder.compressed(self._unrecorded.pop(0).seconds())

    def _compress_one(
        self, request: TrackedRequest, repeated: Repeated | None
    ) -> tuple[CompressedPrefix, Stopwatch]:
        plan, row = request.plan, request.block_ids
        assert plan is not None
        states = self._prefixes.states
        record = self._records.of(request.request_id, plan)
        prefix, stages = self._compressor.compress(
            source_blocks=row[plan.start_blocks : plan.num_prefix_blocks],
            target_blocks=row[request.reserve_start :][: plan.num_compressed_blocks],
            plan=plan,
            observation_queries=self._observation.take(request.request_id),
            reconstruction=repeated.scores if repeated else None,
            scale=self._scale,
            seed=request.seed,
            earlier=states[request.request_id].prefix if plan.start_blocks else None,
            record=record,
        )
        if record is not None:
            self._records.compressed(request.request_id, prefix.fitted or plan, prefix)
        if repeated is not None:
            repeated.record(stages)
        return prefix, stages

    def _record_later(self, stages: Stopwatch) -> None:
        if self._recorder is not None:
            self._unrecorded.append(stages)
            self.record_finished()
