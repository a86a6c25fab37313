"""Blocks of two tiers in rounds: a chain of compressions stays within its budget of bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from most_held import most_blocks

from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.planning.round_tiers import least_budget, scored_ratio
from vllm_kvzip.planning.tiers import TierRule

N, Q, SPLIT = 16, 30, 2  # 60 tokens in a block of 16


def chain(rule, num_prompt_tokens, count):
    """The next compressions of a request."""
    plans, done = [], None
    while len(plans) < count and (done := rule.next_plan(num_prompt_tokens, done=done)):
        plans.append(done)
    return plans


def rule_of(mode, share=0.1, **changes):
    tiers = TierRule(mode, N, Q, split=SPLIT, full_share=share, by_bytes=changes.pop("by", False))
    values = {"keep_ratio": 0.5, "min_prompt_tokens": 100, "sink_tokens": 4, "recent_tokens": 16}
    return PrefixRule(**{**values, **changes}, block_size=N, tiers=tiers)


def test_pairs_are_quantized_before_they_are_dropped():
    plans = chain(rule_of("mixed", decode_blocks=10), 20, 10)
    assert [plan.num_full_blocks for plan in plans[:6]] == [8, 6, 4, 2, 2, 2]
    dropped = [plan.num_candidate_tokens - plan.kept_tokens for plan in plans]
    assert dropped == [0, 0, 0, 0, 48, 80, 80, 80, 80, 80]
    assert {plan.num_compressed_blocks for plan in plans} == {10}


def test_without_a_full_tier_the_budget_fills_later():
    plans = chain(rule_of("quantize", decode_blocks=10), 20, 8)
    assert [plan.num_compressed_blocks for plan in plans] == [4, 7, 10, 10, 10, 10, 10, 10]
    assert [plan.start_blocks for plan in plans] == [0, 15, 26, 34, 39, 44, 49, 54]
    assert all(plan.num_full_blocks == 0 for plan in plans)


@given(
    mode=st.sampled_from(["mixed", "quantize"]),
    ratio=st.floats(0.05, 1),
    share=st.floats(0.02, 0.98),
    by_bytes=st.booleans(),
    protected=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    budgets=st.tuples(st.none() | st.integers(0, 30), st.none() | st.integers(0, 30)),
    num_prompt_tokens=st.integers(1, 1500),
)
def test_no_round_exceeds_its_budget_or_keeps_what_is_not_there(
    mode, ratio, share, by_bytes, protected, budgets, num_prompt_tokens
):
    least = least_budget(sum(protected), N, mode)
    prefill, decode = (None if more is None else least + more for more in budgets)
    if prefill is None and decode is None:
        return
    rule = rule_of(
        mode, share, by=by_bytes, keep_ratio=ratio, sink_tokens=protected[0],
        recent_tokens=protected[1], prefill_blocks=prefill, decode_blocks=decode,
    )  # fmt: skip
    most = most_blocks(rule, num_prompt_tokens, RequestOptions())
    done = None
    for plan in chain(rule, num_prompt_tokens, 25):
        assert plan.boundary_tokens > (done.boundary_tokens if done else 0)
        assert plan.num_freed_blocks >= 0
        assert plan.num_source_blocks + plan.num_compressed_blocks <= most
        new = plan.num_prefix_blocks - plan.start_blocks
        full_before, kept_before = (done.num_full_blocks, done.kept_tokens) if done else (0, 0)
        assert plan.num_full_blocks <= full_before + new
        assert plan.kept_tokens <= kept_before + new * N
        if done is not None or plan.is_round:
            assert plan.num_compressed_blocks <= max(filter(None, (prefill, decode)))
            where = plan.full_tokens if mode == "mixed" else plan.kept_tokens
            assert where >= min(plan.num_protected_tokens, (full_before + new) * N)
        if done is not None and done.num_quantized_blocks:
            assert plan.num_quantized_pages * Q >= min(protected[0], done.quantized_tokens)
        done = plan


@pytest.mark.parametrize(
    ("ratio", "by_bytes", "share"), [(0.2, False, 0.2), (0.1, True, 0.1 * 3.475)]
)
def test_scorers_are_told_the_share_of_pairs(ratio, by_bytes, share):
    tiers = TierRule("mixed", N, Q, split=SPLIT, full_share=0.1, by_bytes=by_bytes)
    assert scored_ratio(tiers, ratio) == pytest.approx(share)
