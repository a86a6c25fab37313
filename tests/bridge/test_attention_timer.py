"""Which steps are timed, as what, and that all layers count."""

import itertools

import pytest
from scheduler_steps import new_request, output

from vllm_kvzip.vllm_bridge.attention.attention_timer import STEPS_PER_SAMPLE, AttentionTimer

pytestmark = pytest.mark.vllm


class Recorder:
    def __init__(self):
        self.seen = []

    def attended(self, phase, seconds):
        self.seen.append((phase, seconds))


class Ticks:
    """A clock of a device that is through with a mark when it is told so."""

    def __init__(self):
        self.count = itertools.count()
        self.done = float("inf")

    def mark(self):
        return next(self.count)

    def passed(self, mark):
        return mark <= self.done

    def seconds(self, begin, end):
        return float(end - begin)


@pytest.fixture
def timer():
    return AttentionTimer(Recorder(), Ticks())


def run(timer, step, layers=3):
    timer.step_starts(step)
    was_timed = timer.running is not None
    for _ in range(layers if was_timed else 0):
        timer.layer_starts()
        timer.layer_ends()
    timer.step_ends()
    assert timer.running is None
    return was_timed


PREFILL = output(new=[new_request("a", 40, [1])], scheduled={"a": 40})
CHUNK = output(running=[("a", 16, None), ("b", 50, None)], scheduled={"a": 24, "b": 1})
DECODE = output(running=[("a", 40, None), ("b", 51, None)], scheduled={"a": 1, "b": 1})


def test_one_step_in_32_of_each_phase_is_timed(timer):
    timed = [run(timer, DECODE) for _ in range(2 * STEPS_PER_SAMPLE + 1)]
    assert [index for index, was in enumerate(timed) if was] == [0, 32, 64]
    assert timer._recorder.seen == [("decode", 3.0)] * 3
    assert run(timer, PREFILL)
    assert timer._recorder.seen[-1] == ("prefill", 3.0)


@pytest.mark.parametrize("step", [PREFILL, CHUNK], ids=["new", "chunk beside a decode"])
def test_a_step_with_prompt_tokens_is_a_prefill(timer, step):
    run(timer, step)
    assert timer._recorder.seen == [("prefill", 3.0)]


def test_speculated_tokens_are_decoded(timer):
    step = output(running=[("a", 40, None)], scheduled={"a": 5})
    step.scheduled_spec_decode_tokens["a"] = [1, 2, 3, 4]
    run(timer, step)
    assert timer._recorder.seen == [("decode", 3.0)]


def test_a_step_without_tokens_counts_as_none(timer):
    assert not run(timer, output())
    assert run(timer, DECODE)


def test_a_step_is_recorded_when_the_device_is_through_with_it(timer):
    timer._clock.done = -1
    run(timer, DECODE)
    assert timer._recorder.seen == []
    timer._clock.done = 4
    run(timer, DECODE)
    assert timer._recorder.seen == []  # the last layer's end is mark 5
    timer._clock.done = 5
    run(timer, DECODE)
    assert timer._recorder.seen == [("decode", 3.0)]
