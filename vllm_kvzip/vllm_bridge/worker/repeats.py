"""Worker side: prompts whose prefix the model is repeating, over one step or several.

Which chunks are repeated before which step is the scheduler's decision
(``vllm_bridge/scheduler/repeat_schedule.py``). What fails meanwhile concerns one prompt alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_kvzip.vllm_bridge.outcomes import log_failure

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vllm_kvzip.clocks import Clock, Stopwatch
    from vllm_kvzip.vllm_bridge.passes.scoring_pass import ReconstructionPass, RepeatedContext
    from vllm_kvzip.vllm_bridge.passes.window_caches import ContextEnd, WindowCaches
    from vllm_kvzip.vllm_bridge.worker.requests import TrackedRequest


@dataclass
class Repeated:
    """One prefix that the model repeats.

    Attributes:
        context: with its scores, as far as they are known.
        spans: marks of the clock around passes, and this prefix's share of the work between them.
    """

    context: RepeatedContext
    spans: list[tuple[Any, Any, float]] = field(default_factory=list)

    @property
    def scores(self) -> torch.Tensor:
        """Float32 ``[L, H, T]``."""
        return self.context.scores

    def record(self, stages: Stopwatch) -> None:
        """Count the passes for stage ``score``."""
        for begin, end, share in self.spans:
            stages.add("score", begin, end, share)


class Repeats:
    """Runs the model over prefixes, and keeps what it has found until it is asked for.

    Args:
        reconstruction: runs the model.
        clock: measures the passes.
        windows: where the ends of contexts lie in layers with a sliding window; None where no
            layer has one.
        num_ranks: of tensor parallelism. With several of them an error goes on upwards and ends
            the engine, as one in vLLM's own step does: the other ranks may be waiting for this one
            inside the model, where nothing can be agreed upon.
    """

    def __init__(
        self,
        reconstruction: ReconstructionPass,
        clock: Clock,
        num_ranks: int,
        windows: WindowCaches | None = None,
    ) -> None:
        self.reconstruction = reconstruction
        self._windows = windows
        self._clock = clock
        self._num_ranks = num_ranks
        self._found: dict[str, Repeated | None] = {}  # by request; None: it failed

    def go_on(self, orders: Sequence[tuple[TrackedRequest, int | None]]) -> None:
        """Repeat the next chunks of some prefixes in common passes, one by one where these fail.

        Args:
            orders: requests, and how many chunks of each; None: all that are left.
        """
        work = []
        for request, wanted in orders:
            key = request.request_id
            if key not in self._found:
                self._found[key] = self._begin(request, is_complete=wanted is None)
            if repeated := self._found[key]:
                left = repeated.context.num_left
                if count := left if wanted is None else min(wanted, left):
                    work.append((key, repeated, count))
        if work:
            self._repeat(work)

    def take(self, request_id: str) -> Repeated | None:
        """What was found about a prefix, which is forgotten here; None: the model failed on it."""
        return self._found.pop(request_id, None)

    def forget(self, request_id: str) -> None:
        """Nobody will ask for a request's prefix."""
        self._found.pop(request_id, None)

    def _begin(self, request: TrackedRequest, is_complete: bool) -> Repeated | None:
        assert request.plan is not None
        blocks = request.block_ids[: request.plan.num_prefix_blocks]
        try:
            end = self._find_end(request, is_complete)
            return Repeated(self.reconstruction.begin(request.token_ids, blocks, end))
        except Exception as error:
            if self._num_ranks > 1:
                raise
            log_failure(request.request_id, error)
            return None

    def _find_end(self, request: TrackedRequest, is_complete: bool) -> ContextEnd | None:
        """A request that waits has one token less in the cache than completes its context."""
        plan = request.plan
        if self._windows is None or plan is None:
            return None
        num_computed = plan.ready_tokens - (not is_complete)
        return self._windows.find_end(
            min(num_computed, plan.boundary_tokens), request.rows_of_others
        )

    def _repeat(self, work: list[tuple[str, Repeated, int]]) -> None:
        begin = self._clock.mark()
        try:
            self.reconstruction.go_on([(repeated.context, count) for _, repeated, count in work])
        except Exception as error:
            if self._num_ranks > 1:
                raise
            if len(work) > 1:
                for one in work:
                    self._repeat([one])
                return
            ((request_id, _, _),) = work
            log_failure(request_id, error)
            self._found[request_id] = None
            return
        end = self._clock.mark()
        total = sum(count for _, _, count in work)
        for _, repeated, count in work:
            repeated.spans.append((begin, end, count / total))
