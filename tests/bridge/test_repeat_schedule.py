"""Repeated contexts share the steps' token budget with prefill: random histories."""

import random

import pytest

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.reconstruction import RepeatRule, iter_chunks
from vllm_kvzip.vllm_bridge.scheduler.repeat_schedule import RepeatSchedule

pytestmark = pytest.mark.vllm

BUDGET = 256
RULE = RepeatRule.fitting(256, BUDGET, first_prompt=3, later_prompt=5)
PREFIXES = PrefixRule(0.3, min_prompt_tokens=64, sink_tokens=4, recent_tokens=16, block_size=32)
OUTPUT_TOKENS = 6


def test_lengths_follow_from_the_context_alone():
    for length in (1, 5, 243, 244, 500, 1900):
        chunks = iter_chunks(range(length), RULE.chunk_tokens, range(3), range(5))
        assert RULE.fed_tokens(length) == [len(chunk.input_ids) for chunk in chunks]
    assert max(RULE.fed_tokens(5000)) == BUDGET


class History:
    """Clients, a scheduler that asks, and workers that do as they are told."""

    def __init__(self, seed, most_running):
        self.random = random.Random(seed)
        self.schedule = RepeatSchedule(RULE, BUDGET)
        self.most_running = most_running
        self.waiting, self.running = [], []
        self.fed = {}  # chunks repeated, by request
        self.crossed = {}  # step before which a request's prefix was complete
        self.due = []
        self.number = 0
        self.events = set()
        self.steps = []  # tokens of repeated chunks and of prefill

    def add(self):
        length = self.random.choice([20, 90, 200, 250, 500, 1200])
        params = SamplingParams(max_tokens=OUTPUT_TOKENS)
        self.waiting.append(Request(str(self.number), [1] * length, params, None))
        self.number += 1

    def plan(self, request):
        done = request.request_id in self.crossed
        return None if done else PREFIXES.plan(request.num_prompt_tokens)

    def step(self):
        self.schedule.step_starts()
        scheduled, fed, prefill = {}, 0, 0
        for request in list(self.running):
            wanted = min(BUDGET, request.num_tokens - request.num_computed_tokens)
            first = request.num_computed_tokens
            count = self.schedule.next_stop(request, self.plan(request), first, wanted)
            if wanted == 1 and first >= request.num_prompt_tokens:
                assert count == 1  # a decoding request never waits
            if count:
                scheduled[request.request_id] = count
                prefill += count if count > 1 else 0
            else:
                self.events.add("waited")
        while self.waiting and len(self.running) < self.most_running:
            request = self.waiting[0]
            count = self.schedule.next_stop(
                request, self.plan(request), 0, min(BUDGET, request.num_tokens)
            )
            if not count:
                break
            self.running.append(self.waiting.pop(0))
            request.status = RequestStatus.RUNNING
            scheduled[request.request_id] = count
            prefill += count
        if self.running and self.random.random() < 0.05:
            victim = self.running.pop()
            victim.status = RequestStatus.PREEMPTED
            victim.num_computed_tokens = 0
            self.waiting.insert(0, victim)
            scheduled.pop(victim.request_id, None)
            self.fed.pop(victim.request_id, None)
            self.crossed.pop(victim.request_id, None)  # a compressed one starts again as well
            self.due = [key for key in self.due if key != victim.request_id]
            self.events.add("preempted")
        orders = self.schedule.step_ends(scheduled)
        for key in self.due:  # the workers run what is left before the step
            fed += sum(self.left(key))
            self.fed[key] = len(self.chunks(key))
        for key, count in orders.items():
            fed += sum(self.left(key)[:count])
            self.fed[key] = self.fed.get(key, 0) + count
            self.events.add("spread")
        self.due = []
        for request in list(self.running):
            count = scheduled.get(request.request_id, 0)
            request.num_computed_tokens += count
            plan = self.plan(request)
            if plan and request.num_computed_tokens >= plan.ready_tokens:
                assert len(self.left(request.request_id)) == 1
                self.crossed[request.request_id] = True
                self.due.append(request.request_id)
            if count and request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(1)
            if request.num_output_tokens == OUTPUT_TOKENS:
                request.status = RequestStatus.FINISHED_STOPPED
                self.running.remove(request)
        self.steps.append((fed, prefill))

    def chunks(self, key):
        length = next(r.num_prompt_tokens for r in self.running if r.request_id == key)
        return RULE.fed_tokens(PREFIXES.plan(length).boundary_tokens)

    def left(self, key):
        return self.chunks(key)[self.fed.get(key, 0) :]


@pytest.mark.parametrize("seed", range(8))
def test_a_step_and_what_is_repeated_before_it_keep_within_the_budget(seed):
    history = History(seed, most_running=6)
    for _ in range(40):
        for _ in range(history.random.randint(0, 2)):
            history.add()
        history.step()
    for _ in range(600):  # then all of them come to their end
        if not history.running and not history.waiting:
            break
        history.step()
    assert not history.running
    assert not history.waiting
    assert all(fed + prefill <= BUDGET for fed, prefill in history.steps)
    assert {"waited", "spread", "preempted"} <= history.events


def test_nothing_is_repeated_while_the_engine_is_paused():
    schedule = RepeatSchedule(RULE, BUDGET)
    request = Request("a", [1] * 1000, SamplingParams(), None)
    request.status = RequestStatus.RUNNING
    plan = PREFIXES.plan(1000)
    schedule.step_starts()
    assert schedule.next_stop(request, plan, 900, 100) == 99  # waits before the last token
    assert schedule.step_ends({"a": 99}) == {}
    schedule.step_starts(is_paused=True)
    assert schedule.step_ends({}) == {}
    schedule.step_starts()
    assert schedule.step_ends({}) == {"a": 1}
    request.status = RequestStatus.PREEMPTED
    schedule.step_starts()
    assert schedule.step_ends({}) == {}
