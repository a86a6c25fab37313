"""Who is admitted, whose round waits, and that every request ends, with vLLM's own scheduler."""

import pytest
from own_scheduler import BLOCK, build_scheduler, live, request

pytestmark = pytest.mark.vllm

LONGEST = 50  # blocks
NUM_STEPS = 2 * LONGEST * BLOCK


def scheduler_of(num_blocks, kvzip, asynchronous=False, **engine):
    return build_scheduler(
        num_blocks, kvzip={"min_prompt_tokens": 64, **kvzip}, async_scheduling=asynchronous,
        max_model_len=LONGEST * BLOCK, **engine,
    )  # fmt: skip


def blocks_back(scheduler):
    pool = scheduler.kv_cache_manager.block_pool
    return pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("scorer", ["keydiff", "kvzip"])
def test_a_resumed_request_that_fits_only_raw_is_left_alone(scorer, asynchronous):
    """Its own keep ratio is higher than the server's, and its run is gone."""
    scheduler = scheduler_of(65, {"keep_ratio": 0.3, "scorer": scorer}, asynchronous)
    assert scheduler._kvzip_manager.kv_cache_spec.rule.startup_blocks(LONGEST * BLOCK) == 65
    lone = request("a", 33 * BLOCK, max_tokens=17 * BLOCK, kvzip_keep_ratio=0.9)
    scheduler.add_request(lone)
    for _ in live(scheduler, NUM_STEPS):
        if lone.num_output_tokens == 17 * BLOCK - 9 and not lone.num_preemptions:
            assert scheduler._kvzip_manager.rows["a"].run is not None
            assert scheduler.reset_prefix_cache(reset_running_requests=True)
    assert lone.num_output_tokens == 17 * BLOCK
    assert lone.num_preemptions == 1
    assert blocks_back(scheduler)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_a_round_that_never_fits_is_left_out(own, asynchronous, caplog):
    large, small = LONGEST * BLOCK * 6 // 10, 8 * BLOCK
    kvzip = {"keep_ratio": 0.2, "decode_budget": small if own else large}
    scheduler = scheduler_of(60, kvzip, asynchronous)
    assert ("lower decode_budget" in caplog.text) is not own
    options = {"kvzip_decode_budget": large} if own else {}
    lone = request("a", 30, max_tokens=(LONGEST - 1) * BLOCK, **options)
    scheduler.add_request(lone)
    for _ in live(scheduler, NUM_STEPS):
        assert not scheduler._kvzip_manager.crossing
    assert lone.num_output_tokens == lone.max_tokens
    assert lone.num_preemptions == 0
    assert blocks_back(scheduler)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_pool_of_a_prefill_budget_holds_its_rounds(asynchronous):
    budget = LONGEST * 6 // 10
    kvzip = {"keep_ratio": 0.3, "prefill_budget": budget * BLOCK}
    rule = scheduler_of(99, kvzip)._kvzip_manager.kv_cache_spec.rule
    needed = rule.startup_blocks(LONGEST * BLOCK)
    assert needed == LONGEST + budget
    scheduler = scheduler_of(needed + 1, kvzip, asynchronous, max_num_batched_tokens=512)
    lone = request("a", LONGEST * BLOCK - 9)
    scheduler.add_request(lone)
    crossed = sum(bool(scheduler._kvzip_manager.crossing) for _ in live(scheduler, NUM_STEPS))
    assert crossed >= 2
    assert lone.num_output_tokens == 9
    assert lone.num_preemptions == 0
    assert blocks_back(scheduler)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_read_beside_a_reserve_takes_free_blocks_only(asynchronous):
    """The pool holds a round and no more, and a resumed request reads on behind it."""
    scheduler = scheduler_of(78, {"decode_budget": 30 * BLOCK}, asynchronous)
    lone = request("a", 30, max_tokens=(LONGEST - 1) * BLOCK)
    scheduler.add_request(lone)
    preempted = False
    for _ in live(scheduler, NUM_STEPS):
        if lone.num_output_tokens == 48 * BLOCK and not preempted:
            preempted = scheduler.reset_prefix_cache(reset_running_requests=True)
    assert lone.num_output_tokens == lone.max_tokens
    assert lone.num_preemptions == 1
    assert blocks_back(scheduler)


def first_step(decode_budget, *requests):
    scheduler = scheduler_of(50, {"decode_budget": decode_budget})
    for one in requests:
        scheduler.add_request(one)
    return next(live(scheduler, 1))


@pytest.mark.parametrize("options", [{}, {"kvzip_decode_budget": 10**6}])
def test_requests_that_never_have_a_round_are_admitted_as_without_a_budget(options):
    """Three of them hold thirteen blocks each, and a fourth one does not fit."""
    options = {"kvzip_context_tokens": 0, **options}
    made = [request(name, 390, max_tokens=80, **options) for name in "abcd"]
    without = [request(name, 390, max_tokens=80, kvzip="off") for name in "abcd"]
    found = first_step(12 * BLOCK, *made)
    assert found == first_step(12 * BLOCK, *without)
    assert len(found) == 3


def test_the_largest_round_of_all_is_kept_free():
    """One with a budget of 16 blocks holds 20 on average, the others hold 2 each."""
    small = [request(name, 30, max_tokens=999, kvzip_decode_budget=2 * BLOCK) for name in "bcdefgh"]
    large = request("a", 30, max_tokens=1500)
    assert 20 + 6 * 2 + 16 <= 49 < 20 + 7 * 2 + 16
    assert len(first_step(16 * BLOCK, large, *small)) == 7
