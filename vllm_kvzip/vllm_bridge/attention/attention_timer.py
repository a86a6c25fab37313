"""How long attention takes, of a sample of the steps.

Attention is what compression makes cheaper, so an operator wants to see it. One step of 32 is
timed; in the others a layer looks at one attribute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.clocks import HostClock, Stopwatch
from vllm_kvzip.metrics import PHASES

if TYPE_CHECKING:
    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.vllm_bridge.stats_export import WorkerRecorder
    from vllm_kvzip.vllm_bridge.symbols import SchedulerOutput

STEPS_PER_SAMPLE = 32


class AttentionTimer:
    """Adds up the seconds of all layers of a step, every 32nd step of a phase.

    A step is recorded once the device has finished it, which may be some steps later.

    Args:
        recorder: gets the sums.
        clock: marks where a layer's attention begins and ends.

    Attributes:
        running: set in a step that is timed; the layers look at it.
    """

    def __init__(self, recorder: WorkerRecorder, clock: Clock | None = None) -> None:
        self._recorder = recorder
        self._clock = clock or HostClock()
        self._steps = dict.fromkeys(PHASES, 0)
        self._timed: list[Stopwatch] = []
        self._phase = ""
        self._begin: Any = None
        self.running: Stopwatch | None = None

    def step_starts(self, output: SchedulerOutput) -> None:
        """Decide whether the step is timed."""
        if not output.total_num_scheduled_tokens:
            return
        self._record_finished()
        phase = _phase(output)
        if self._steps[phase] % STEPS_PER_SAMPLE == 0:
            self.running = Stopwatch(self._clock)
            self._phase = phase
        self._steps[phase] += 1

    def step_ends(self) -> None:
        """Record the step, if any layer ran and the device has finished it."""
        if self.running is not None:
            self._timed.append(self.running)
        self.running = None
        self._record_finished()

    def layer_starts(self) -> None:
        """A layer's attention starts."""
        self._begin = self._clock.mark()

    def layer_ends(self) -> None:
        """A layer's attention has ended."""
        if self.running is not None:
            self.running.add(self._phase, self._begin, self._clock.mark())

    def _record_finished(self) -> None:
        while self._timed and self._timed[0].finished:
            for phase, seconds in self._timed.pop(0).seconds().items():
                self._recorder.attended(phase, seconds)


def _phase(output: SchedulerOutput) -> str:
    """``decode`` when every request computes one token, speculated ones aside."""
    if output.scheduled_new_reqs:
        return "prefill"
    speculated = sum(map(len, output.scheduled_spec_decode_tokens.values()))
    own = output.total_num_scheduled_tokens - speculated
    return "prefill" if own > len(output.num_scheduled_tokens) else "decode"
