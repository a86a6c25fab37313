"""Whose queries a step shows, and which of them a compression gets; fed with vLLM's own outputs."""

from types import SimpleNamespace

import pytest
import torch
from scheduler_steps import new_request, output

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.reuse_rule import ReuseRule
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
from vllm_kvzip.vllm_bridge.scheduler.prefix_lookup import PrefixLookup
from vllm_kvzip.vllm_bridge.worker.observation import QueryObservation
from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker

GROUP = CompressedGroup(0, ("a layer",), (16,))
RULE = PrefixRule(
    0.5, min_prompt_tokens=512, sink_tokens=1, recent_tokens=1, block_size=16, decode_blocks=2
)
FIRST, WINDOW = 48, 8  # boundary of the first round: a budget and a half


class World:
    """One request of 20 prompt tokens; the query of position p holds the number p, or a guess's."""

    def __init__(self, num_guessed=0, rounds_only=False):
        rule = RULE if not num_guessed else PrefixRule(**{**vars(RULE), "num_guessed_tokens": 4})
        self.tracker = RequestTracker(rule, GROUP)
        geometry = CacheGeometry(1, 1, 1, 2, 16)
        self.observation = QueryObservation(geometry, {"layer": 0}, WINDOW, rounds_only)
        self.num_observed = []

    def step(self, step, position, count, right=None):
        """Compute ``count`` tokens from ``position`` on; all but ``right`` are wrong guesses."""
        self.tracker.drop_ended(step)
        self.tracker.advance(step)
        self.observation.plan_step(step, self.tracker)
        spans = self.observation.spans(["a"], torch.tensor([0, count]))
        self.num_observed.append(sum(span.end - span.start for span in spans))
        right = count if right is None else right
        numbers = [p if p - position < right else -1 for p in range(position, position + count)]
        query = torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, 1, 2)
        self.observation.keep(SimpleNamespace(layer_name="layer"), query, spans, query.dtype)
        return list(self.tracker.crossing(step))

    def decode(self, first, last, count=1, right=None):
        for position in range(first, last, right or count):
            step = output(running=[("a", position, None)], scheduled={"a": count})
            if complete := self.step(step, position, count, right):
                return complete
        return []

    def taken(self):
        (queries,) = self.observation.take("a")
        return queries[:, 0, 0, 0].tolist()


def start(world):
    world.step(output(new=[new_request("a", 20, [1, 2])], scheduled={"a": 20}), 0, 20)


def test_only_the_last_decode_steps_before_a_round_are_observed():
    world = World()
    start(world)
    (request,) = world.decode(20, 60)
    assert request.plan.boundary_tokens == FIRST
    assert world.num_observed == [0] + [0] * (FIRST - WINDOW - 20) + [1] * WINDOW
    assert world.taken() == list(range(FIRST - WINDOW, FIRST))
    assert len(world.observation) == 0


def test_the_next_round_has_a_window_of_its_own():
    world = World()
    start(world)
    (request,) = world.decode(20, 60)
    world.taken()
    world.tracker.folded(request, request.block_ids)
    (request,) = world.decode(FIRST, 90)
    assert request.plan.boundary_tokens == FIRST + 16
    assert world.taken() == list(range(FIRST + 16 - WINDOW, FIRST + 16))


def test_wrong_guesses_are_replaced_and_what_waits_is_not_observed():
    """Each step guesses four tokens of which one turns out right."""
    world = World(num_guessed=4)
    start(world)
    (request,) = world.decode(20, 90, count=5, right=2)
    assert request.plan.ready_tokens == FIRST + 4
    assert world.taken() == list(range(FIRST - WINDOW, FIRST))


def test_a_request_that_ends_before_its_round_leaves_nothing():
    world = World()
    start(world)
    world.decode(20, FIRST - 2)
    assert len(world.observation) == 1
    for request_id in world.tracker.drop_ended(output(finished=["a"])):
        world.observation.forget(request_id)
    assert len(world.observation) == 0


def test_a_prompt_is_observed_unless_the_scorer_wants_rounds_only():
    for rounds_only, observed in ((False, WINDOW), (True, 0)):
        world = World(rounds_only=rounds_only)
        step = output(new=[new_request("a", 512, list(range(32)))], scheduled={"a": 512})
        (request,) = world.step(step, 0, 512)
        assert not request.plan.is_round
        assert world.num_observed == [observed]


@pytest.mark.parametrize(
    ("changes", "end"),
    [
        ({"prefill_blocks": 4, "decode_blocks": None}, 96),  # a budget and a half
        ({"decode_blocks": 2}, FIRST),
    ],
)
def test_the_window_of_a_first_round_is_never_taken_from_the_raw_cache(changes, end):
    """Else what a round keeps would depend on what happened to be cached."""
    rule = PrefixRule(**{**vars(RULE), **changes})
    request = SimpleNamespace(sampling_params=None, num_prompt_tokens=40)
    for window, most in ((0, end - 1), (WINDOW, end - WINDOW)):
        reuse = ReuseRule(round_observation_tokens=window)
        lookup = PrefixLookup(None, rule, reuse, None, None)
        assert lookup.most_raw_tokens(request, 400) == most
