"""Block manager and worker book-keeping together, on vLLM's own pool, through random histories.

After every step the pool must add up, both sides must hold the same row, and every slot a request
reads must hold its own tokens; `random_history.py` makes the steps.
"""

from collections import Counter

import pytest
from cache_manager import build_cache
from random_history import BLOCK, NUM_BLOCKS, World
from vllm import SamplingParams
from vllm.v1.request import Request, RequestStatus

from vllm_kvzip.planning.request_options import LEFT_ALONE
from vllm_kvzip.planning.reuse_rule import ReuseRule
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.vllm_bridge.scheduler.room import next_stop

pytestmark = pytest.mark.vllm

BUDGETS = [(None, None, 0), (7, None, 0), (None, 6, 0), (9, 5, 4)]
"""Prefill and decode budgets in blocks, and guesses of speculative decoding."""

HISTORIES = [
    *((seed, budgets, "evict") for seed in range(8) for budgets in BUDGETS),
    *((seed, budgets, "mixed") for seed in range(3) for budgets in BUDGETS[1:]),
    *((seed, budgets, "quantize") for seed in range(3) for budgets in BUDGETS[1:]),
]


@pytest.mark.parametrize(("seed", "budgets", "mode"), HISTORIES)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_random_histories_keep_pool_and_rows_in_order(seed, asynchronous, budgets, mode, tmp_path):
    tiers = None if mode == "evict" else TierRule(mode, BLOCK, 28, split=2, full_share=0.2)
    world = World(seed, tmp_path, asynchronous, budgets, tiers=tiers)
    world.live()
    assert world.events["compression"] > 10
    assert world.events["preemption"] > 0
    assert world.events["abort"] > 0
    assert world.events["prefix hit"] > 0
    assert world.events["answer within its budget"] > 100 or budgets[1] is None
    assert world.events["wrong guess"] > 100 or not budgets[2]
    assert world.cache.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    manager = world.manager
    assert not manager.rows
    world.step()
    assert len(world.runs) == len(manager.prefixes)  # the workers forget what was dropped
    EVENTS.update(world.events)


def test_a_request_that_waits_is_planned_anew(tmp_path):
    """Its compression may have failed in the meantime, so that it is left alone from then on."""
    reuse = ReuseRule(fingerprint="00" * 16)
    cache, manager, hasher = build_cache(
        tmp_path, BLOCK, 10, reuse, keep_ratio=0.5, min_prompt_tokens=40
    )
    taken = cache.block_pool.get_new_blocks(5)
    request = Request("a", [1] * 80, SamplingParams(max_tokens=9), None, block_hasher=hasher)
    assert cache.allocate_slots(request, 80) is None
    assert not manager.rows
    cache.block_pool.free_blocks(taken)
    request.sampling_params.extra_args = {LEFT_ALONE: "failed"}
    assert cache.allocate_slots(request, 80) is not None
    assert manager.rows["a"].reservation is None
    assert manager.end_of_schedule({"a"}) is None


def test_rounds_that_come_at_once_take_turns(tmp_path):
    """All requests begin together, so that all of their rounds fall into one step."""
    world = World(0, tmp_path, False, (None, 6, 0))
    world.abort_share = 0
    budget, settled = 6, 6 + 3 // 2
    num_requests = (NUM_BLOCKS - 1 - budget) // settled
    for number in range(2 * num_requests):
        params = SamplingParams(max_tokens=400)
        request = Request(str(number), [number] * 20, params, None, block_hasher=world.hasher)
        world.requests[request.request_id] = request
        world.waiting.append(request)
    most = 0
    while world.running or world.waiting:
        world.step()
        world.check_pool()
        most = max(most, len(world.running))
    assert most == num_requests
    assert world.events["round"] >= 5 * 2 * num_requests
    assert world.events["waited for a fold"] > num_requests
    assert world.events["preemption"] <= num_requests


class Steps:
    """Steps of single requests in a pool; with asynchronous scheduling none of them is processed
    when the next one is scheduled."""

    def __init__(self, directory, num_blocks, **rule):
        self.cache, self.manager, self._hasher = build_cache(
            directory, BLOCK, num_blocks, ReuseRule(fingerprint="00" * 16), keep_ratio=0.5,
            min_prompt_tokens=40, **rule,
        )  # fmt: skip

    def request(self, name, tokens, max_tokens=400, answered=(), **options):
        params = SamplingParams(max_tokens=max_tokens, extra_args=options)
        made = Request(name, list(tokens), params, None, block_hasher=self._hasher)
        if answered:
            made.append_output_token_ids(list(answered))
            made.status = RequestStatus.PREEMPTED
        return made

    def run(self, request, num_tokens, asynchronous=False, step_starts=True):
        """Let one step compute up to ``num_tokens`` of a request; how many of its tokens were
        found, and how many are computed; None where there is no room."""
        if step_starts:
            self.cache.new_step_starts()
        first, found, hit = request.num_computed_tokens, 0, None
        if is_new := request.request_id not in self.manager.rows:
            hit, found, _ = self.cache.get_computed_blocks(request)
        plan, must_wait = self.manager.plan_ahead(request)
        count = next_stop(self.manager, request, plan, must_wait, first + found, num_tokens)
        if count:
            granted = self.cache.allocate_slots(
                request, count, num_new_computed_tokens=found, new_computed_blocks=hit,
                full_sequence_must_fit=is_new,
            )  # fmt: skip
            if granted is None:
                return None
        self.manager.end_of_schedule({request.request_id})
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = first + found + count
        request.num_in_flight_tokens = count if asynchronous else 0
        return found, count


def test_what_is_computed_over_a_round_is_not_found_under_the_run_before_it(tmp_path):
    """A resumed request starts from a cached context, and its answer crosses while it is read."""
    steps = Steps(tmp_path, 120, decode_blocks=6)
    context, options = list(range(64)), {"kvzip_context_tokens": 64}
    first = steps.request("first", [*context, *[900] * 20], **options)
    steps.run(first, 84)
    steps.cache.new_step_starts()
    steps.cache.free(first)
    answer = range(1000, 1300)
    resumed = steps.request("resumed", [*context, *range(100, 116)], answered=answer, **options)
    assert steps.run(resumed, 400, asynchronous=True) == (64, 112)
    reserved = steps.manager.rows["resumed"].reservation.run.blocks
    steps.run(resumed, 400, asynchronous=True)
    steps.cache.new_step_starts()
    steps.cache.free(resumed)
    later = steps.request("later", [*resumed.all_token_ids, 7, 8], **options)
    hit, num_found, _ = steps.cache.get_computed_blocks(later)
    assert num_found == 64 + 112  # all that was computed over the context
    assert not any(block in reserved for block in hit.blocks[0])


ALONE = {"kvzip_context_tokens": 0}  # only the answer is compressed


def steps_with_a_crossing_row(directory, num_free, **priorities):
    """A round that would give 3 blocks back, one that needs 6, and so many free blocks."""
    steps = Steps(directory, 60, decode_blocks=6)
    crossing = steps.request("crossing", range(47), kvzip_decode_budget=32, **ALONE)
    large = steps.request("large", range(200, 343), **ALONE)
    for request in (crossing, large):
        request.priority = priorities.get(request.request_id, 0)
    steps.run(crossing, 47)
    steps.run(large, 143)
    large.append_output_token_ids(7)
    assert steps.run(crossing, 1, asynchronous=True) == (0, 1)
    assert list(steps.manager.crossing) == ["crossing"]
    pool = steps.cache.block_pool
    pool.get_new_blocks(pool.get_num_free_blocks() - num_free)
    return steps, crossing, large


def test_a_round_waits_if_the_blocks_that_come_back_will_do(tmp_path):
    steps, crossing, large = steps_with_a_crossing_row(tmp_path, 3)
    assert steps.run(large, 1) == (0, 0)
    assert steps.run(steps.request("new", range(9), max_tokens=9), 9, step_starts=False) is None
    crossing.num_in_flight_tokens = 0
    assert steps.run(large, 1) == (0, 1)
    assert list(steps.manager.crossing) == ["large"]


def test_a_round_waits_for_nobody_who_gives_too_little_back(tmp_path):
    steps, _, large = steps_with_a_crossing_row(tmp_path, 2)
    assert steps.run(large, 1) is None  # so that vLLM preempts
    assert steps.run(steps.request("new", range(9), max_tokens=9), 9, step_starts=False) == (0, 9)


def test_blocks_of_a_prompt_that_others_read_too_do_not_come_back(tmp_path):
    steps, crossing, large = steps_with_a_crossing_row(tmp_path, 4)
    sharing = steps.request("sharing", crossing.prompt_token_ids[:33], max_tokens=9)
    assert steps.run(sharing, 1) == (32, 1)
    assert steps.cache.block_pool.get_num_free_blocks() == 3
    assert steps.run(large, 1) is None


def test_later_rounds_wait_behind_one_that_waits(tmp_path):
    steps, _, large = steps_with_a_crossing_row(tmp_path, 20)
    small = steps.request("small", range(400, 447), kvzip_decode_budget=32, **ALONE)
    assert steps.run(small, 47) == (0, 47)
    small.append_output_token_ids(7)
    steps.cache.block_pool.get_new_blocks(14)
    assert steps.run(large, 1) == (0, 0)
    assert steps.run(small, 1, step_starts=False) == (0, 0)
    assert steps.run(small, 1) == (0, 1)  # three blocks are free, and it needs two


def test_nobody_waits_for_a_less_important_request(tmp_path):
    steps, _, large = steps_with_a_crossing_row(tmp_path, 3, crossing=5, large=1)
    assert steps.run(large, 1) == (0, 0)
    steps.manager.by_priority = True
    assert steps.run(large, 1) is None


def test_what_is_read_before_a_row_folds_takes_free_blocks_only(tmp_path):
    steps = Steps(tmp_path, 60, decode_blocks=6)
    resumed = steps.request("resumed", range(20), answered=range(300, 600), **ALONE)
    assert steps.run(resumed, 400, asynchronous=True) == (0, 144)
    pool = steps.cache.block_pool
    pool.get_new_blocks(pool.get_num_free_blocks() - 1)
    assert steps.run(resumed, 40, asynchronous=True) == (0, 16)
    assert steps.run(resumed, 40, asynchronous=True) == (0, 32)  # folded, up to the next round


EVENTS = Counter()


def test_the_histories_had_compressed_hits_and_resets():
    assert EVENTS["compressed hit"] > 100
    assert EVENTS["reset"] > 0
    assert EVENTS["late fold"] > 100
    assert EVENTS["round"] > 1000
