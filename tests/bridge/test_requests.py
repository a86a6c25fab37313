"""The worker's book-keeping, fed with real scheduler outputs of vLLM's own classes."""

from dataclasses import replace

from scheduler_steps import new_request, output

from vllm_kvzip.core import PrefixPlan
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.storage.head_pages import fold_row
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker

RULE = PrefixRule(0.5, min_prompt_tokens=32, sink_tokens=1, recent_tokens=1, block_size=16)
GROUP = CompressedGroup(0, ("a layer",), (16,))


def run(tracker, step):
    dropped = tracker.drop_ended(step)
    tracker.advance(step)
    return dropped, [request.request_id for request in tracker.crossing(step)]


def test_chunked_prefill_crosses_once_when_the_prompt_is_complete():
    tracker = RequestTracker(RULE, GROUP)
    step = output(new=[new_request("a", 70, [1, 2])], scheduled={"a": 32})
    assert run(tracker, step) == ([], [])
    step = output(running=[("a", 32, [3, 4])], scheduled={"a": 32})
    assert run(tracker, step) == ([], [])
    step = output(running=[("a", 64, [5, 8, 9])], scheduled={"a": 6})
    assert run(tracker, step) == ([], ["a"])
    request = tracker.get("a")
    assert request.plan == PrefixPlan(64, 4, 2, 70, 0.5, num_sink_tokens=1, num_recent_tokens=1)
    assert request.block_ids[request.reserve_start :] == [8, 9]
    step = output(running=[("a", 70, None)], scheduled={"a": 1})
    assert run(tracker, step) == ([], [])


def test_block_ids_are_those_of_the_compressed_group():
    tracker = RequestTracker(RULE, CompressedGroup(1, ("a layer",), (16, 16)))
    new = replace(new_request("a", 60, []), block_ids=([7], [1, 2]))
    run(tracker, output(new=[new], scheduled={"a": 32}))
    step = output(running=[("a", 32, [])], scheduled={"a": 16})
    step.scheduled_cached_reqs.new_block_ids = [([8], [3])]
    assert list(tracker.new_blocks(step)) == [("a", [8]), ("a", [3])]
    run(tracker, step)
    assert tracker.get("a").block_ids == [1, 2, 3]


def test_rows_of_other_groups_are_kept_where_the_model_repeats_contexts():
    tracker = RequestTracker(RULE, CompressedGroup(1, ("a layer",), (16, 16, 16)), repeats=True)
    new = replace(new_request("a", 60, []), block_ids=([0, 7], [1, 2], [0, 9]))
    run(tracker, output(new=[new], scheduled={"a": 32}))
    step = output(running=[("a", 32, [])], scheduled={"a": 16})
    step.scheduled_cached_reqs.new_block_ids = [([8], [3], [])]
    run(tracker, step)
    assert tracker.get("a").block_ids == [1, 2, 3]
    assert tracker.get("a").rows_of_others == {0: [0, 7, 8], 2: [0, 9]}
    run(tracker, output(preempted=["a"]))
    assert tracker.get("a").rows_of_others == {}


def test_a_block_that_a_connector_has_filled_is_not_one_that_a_step_hands_out():
    """A prompt that was loaded whole computes its last token anew, in the last loaded block."""
    tracker = RequestTracker(RULE, GROUP)
    loaded = output(new=[new_request("a", 32, [4, 5, 6], num_computed=31)], scheduled={"a": 1})
    assert list(tracker.new_blocks(loaded)) == [("a", [6])]


def test_short_prompts_are_not_tracked():
    tracker = RequestTracker(RULE, GROUP)
    assert run(tracker, output(new=[new_request("a", 31, [1, 2])], scheduled={"a": 31})) == ([], [])
    assert len(tracker) == 0


def test_a_resumed_request_starts_afresh_and_is_compressed_again():
    tracker = RequestTracker(RULE, GROUP)
    run(tracker, output(new=[new_request("a", 64, [1, 2, 3, 4, 8, 9])], scheduled={"a": 64}))
    tracker.get("a").folded = True
    assert run(tracker, output(preempted=["a"])) == (["a"], [])
    step = output(running=[("a", 16, [1, 5, 6, 7, 2, 3, 4])], scheduled={"a": 60}, resumed=["a"])
    assert run(tracker, step) == (["a"], ["a"])
    request = tracker.get("a")
    assert not request.folded
    assert request.block_ids[request.reserve_start :] == [3, 4]


def test_finished_requests_go_and_their_id_may_come_back():
    tracker = RequestTracker(RULE, GROUP)
    run(tracker, output(new=[new_request("a", 64, [1, 2, 3, 4, 8, 9])], scheduled={"a": 64}))
    step = output(new=[new_request("a", 40, [5, 6, 7])], scheduled={"a": 8}, finished=["a"])
    assert run(tracker, step) == (["a"], [])
    assert run(tracker, output(finished=["a"])) == (["a"], [])
    assert len(tracker) == 0


def test_requests_that_are_left_alone_are_named_when_they_lose_their_blocks():
    """Such a request may have resumed on a compressed prefix of another one."""
    tracker = RequestTracker(RULE, GROUP)
    run(tracker, output(new=[new_request("a", 31, [1, 2])], scheduled={"a": 31}))
    assert run(tracker, output(preempted=["a"])) == (["a"], [])
    step = output(running=[("a", 16, [3, 4])], scheduled={"a": 20}, resumed=["a"])
    assert run(tracker, step) == (["a"], [])
    assert run(tracker, output(finished=["a"])) == (["a"], [])


def test_equal_prefixes_have_equal_seeds():
    tracker = RequestTracker(RULE, GROUP)
    run(tracker, output(new=[new_request(name, 64, [1]) for name in "ab"], scheduled={}))
    run(
        tracker,
        output(
            new=[new_request(name, size, [1]) for name, size in (("c", 79), ("d", 80))],
            scheduled={},
        ),
    )
    assert tracker.get("a").seed == tracker.get("b").seed
    assert tracker.get("a").seed == tracker.get("c").seed  # tokens after the boundary do not count
    assert tracker.get("a").seed != tracker.get("d").seed


def test_a_folded_row_puts_every_dense_block_back_at_its_logical_index():
    plan = PrefixPlan(64, 4, num_compressed_blocks=2, ready_tokens=70, keep_ratio=0.5)
    row = ["p0", "p1", "p2", "p3", "tail", "c0", "c1", "new"]
    folded = fold_row(row, plan, 5, "null")
    assert folded == ["c0", "c1", "null", "null", "tail", "new"]
