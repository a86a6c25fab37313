"""vLLM's scheduler with our additions, over blocks that hold nothing."""

import pytest
from own_scheduler import build_scheduler, request, step

from vllm_kvzip.vllm_bridge.scheduler.unconfirmed import withdraw_uncomputed

pytestmark = pytest.mark.vllm


def test_what_a_preempted_request_did_not_compute_is_not_found():
    scheduler = build_scheduler(
        num_blocks=9,
        scheduling_policy="priority",
        async_scheduling=False,
        max_num_batched_tokens=96,
        long_prefill_token_threshold=64,
    )
    unimportant = request("a", 224, priority=5)
    scheduler.add_request(unimportant)
    assert step(scheduler) == {"a": 96}
    scheduler.add_request(request("b", 32))
    assert step(scheduler) == {"a": 64, "b": 32}
    # "a" is scheduled first and takes the last blocks; "b" then needs one, and "a" has to go.
    assert step(scheduler) == {"b": 1}
    assert unimportant.num_preemptions == 1
    _, found, *_ = scheduler.kv_cache_manager.get_computed_blocks(unimportant)
    assert found == 160


@pytest.mark.parametrize(("scorer", "is_kept"), [("kvzip", True), ("keydiff", False)])
def test_a_window_keeps_the_end_of_a_context_that_is_to_be_repeated(scorer, is_kept):
    scheduler = build_scheduler(
        64,
        window=34,
        kvzip={"scorer": scorer, "min_prompt_tokens": 64},
        async_scheduling=False,
        max_num_batched_tokens=256,
        long_prefill_token_threshold=65,
    )
    scheduler.add_request(request("b", 32))
    scheduler.add_request(request("a", 223))
    blocks = scheduler.kv_cache_manager.coordinator.single_type_managers[1].req_to_blocks["a"]
    assert [step(scheduler)["a"] for _ in range(3)] == [65] * 3
    # What comes after token 191 sees tokens from 159 on, and the next step those from 162 on.
    assert step(scheduler) == {"a": 28, "b": 1}
    assert [not block.is_null for block in blocks] == [False] * 4 + [is_kept, True, True]
    step(scheduler)  # the context is repeated before this step
    assert [not block.is_null for block in blocks] == [False] * 5 + [True] * 2


def test_what_another_group_did_not_compute_is_not_found_in_blocks_of_a_run():
    """Layers with a sliding window took the blocks of a cached run that nobody used."""
    scheduler = build_scheduler(
        num_blocks=24, window=100, kvzip={"min_prompt_tokens": 64}, async_scheduling=False
    )
    scheduler.add_request(request("a", 224))
    while scheduler.has_requests():
        step(scheduler)
    manager = scheduler._kvzip_manager
    (run,) = manager.prefixes.whole_runs()
    (windows,) = manager.others.all_managers()
    pool = manager.block_pool
    others = pool.get_new_blocks(pool.get_num_free_blocks())
    others = [block for block in others if block not in run.blocks]
    pool.free_blocks([*others[:3], *run.blocks])  # the compressed group takes its blocks first
    late = request("b", 96, kvzip="off")
    scheduler.add_request(late)
    scheduler.schedule()
    row = windows.req_to_blocks["b"]
    assert row == run.blocks[:3]
    assert [block.block_hash is not None for block in row] == [True] * 3
    late.num_computed_tokens = 32  # as if it were preempted while the step is being scheduled
    withdraw_uncomputed(manager, late)
    assert [block.block_hash is not None for block in row] == [True, False, False]
