"""How long attention takes, of a sample of the steps.

Attention is what compression makes cheaper, so an operator wants to see it. One step of 32 is
timed; in the others a layer looks at one attribute.
"""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from vllm_kvzip.metrics import PHASES

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm.v1.core.sched.output import SchedulerOutput

    from vllm_kvzip.vllm_bridge.stats_export import WorkerRecorder

STEPS_PER_SAMPLE = 32


class AttentionTimer:
    """Adds up the seconds of all layers of a step, every 32nd step of a phase.

    Args:
        recorder: gets the sums.
        clock: seconds; the device must have finished when it is read.

    Attributes:
        running: whether this step is timed; the layers look at it.
    """

    def __init__(self, recorder: WorkerRecorder, clock: Callable[[], float] = perf_counter) -> None:
        self._recorder = recorder
        self._clock = clock
        self._steps = dict.fromkeys(PHASES, 0)
        self._phase = ""
        self._begin = self._seconds = 0.0
        self.running = False

    def step_starts(self, output: SchedulerOutput) -> None:
        """Decide whether the step is timed."""
        if not output.total_num_scheduled_tokens:
            return
        self._phase = _phase(output)
        self.running = self._steps[self._phase] % STEPS_PER_SAMPLE == 0
        self._steps[self._phase] += 1
        self._seconds = 0.0

    def step_ends(self) -> None:
        """Record the step, if any layer ran."""
        if self.running and self._seconds:
            self._recorder.attended(self._phase, self._seconds)
        self.running = False

    def layer_starts(self) -> None:
        """A layer's attention starts."""
        self._begin = self._clock()

    def layer_ends(self) -> None:
        """A layer's attention has ended."""
        self._seconds += self._clock() - self._begin


def _phase(output: SchedulerOutput) -> str:
    """``decode`` when every request computes one token, speculated ones aside."""
    if output.scheduled_new_reqs:
        return "prefill"
    speculated = output.scheduled_spec_decode_tokens
    for request_id, count in output.num_scheduled_tokens.items():
        if count - len(speculated.get(request_id, ())) > 1:
            return "prefill"
    return "decode"
