"""Blocks of two tiers from a ratio: nothing is lost, nothing exceeds what was asked for."""

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.planning.tiers import TierBlocks, TierRule
from vllm_kvzip.quantization import choose_quantization

N, Q = 16, 60
ratios = st.floats(0.01, 1.0)
lengths = st.integers(1, 400)


@given(ratios, lengths, st.integers(0, 40))
def test_evict_knows_one_tier(ratio, num_blocks, protected):
    blocks = TierRule("evict", N).blocks(ratio, num_blocks, protected)
    wanted = max(ceil(ratio * num_blocks - 1e-9), ceil(protected / N), 1)
    assert blocks == TierBlocks(min(num_blocks, wanted), 0)


@given(ratios, lengths, st.integers(0, 40))
def test_quantize_keeps_at_least_the_ratio_of_tokens(ratio, num_blocks, protected):
    blocks = TierRule("quantize", N, Q).blocks(ratio, num_blocks, protected)
    assert blocks.full == 0
    room = blocks.quantized * Q
    assert room >= min(num_blocks * N, max(ratio * num_blocks * N, protected)) - 1e-6
    assert blocks.quantized <= ceil(num_blocks * N / Q)


def test_without_eviction_a_prompt_needs_as_many_blocks_as_pages():
    rule = TierRule("quantize", N, Q)
    assert rule.blocks(1.0, 120, 20) == TierBlocks(0, 32)  # 1,920 tokens, 60 a page
    assert rule.blocks(1.0, 121, 20) == TierBlocks(0, 33)


@given(ratios, lengths, st.integers(0, 40), st.floats(0.01, 0.99), st.booleans())
def test_mixed_keeps_what_the_ratio_says(ratio, num_blocks, protected, share, by_bytes):
    rule = TierRule("mixed", N, Q, share, by_bytes)
    blocks = rule.blocks(ratio, num_blocks, protected)
    num_tokens = num_blocks * N
    kept_by_all = max(1, min(protected, num_tokens))
    least = ceil(kept_by_all / Q)
    assert blocks.full * N >= kept_by_all or blocks.quantized >= least  # in either tier
    assert blocks.total <= num_blocks
    kept = blocks.full * N + blocks.quantized * Q
    if by_bytes:
        assert blocks.total <= max(ceil(ratio * num_blocks - 1e-9), least)
        assert kept >= num_tokens or blocks.total == max(ceil(ratio * num_blocks - 1e-9), least)
    else:
        assert blocks.total == num_blocks or kept >= ratio * num_tokens - 1e-6
    assert blocks.quantized <= ceil((num_blocks - blocks.full) * N / Q)


def test_protected_tokens_take_the_cheaper_tier():
    """Of one ordinary page more, or of quantized pages for all heads."""
    blocks = TierRule("mixed", N, 28, 0.9).blocks(0.3, 64, 260)
    assert blocks == TierBlocks(17, 2)  # 10 quantized blocks would do in place of one of the 17


def test_a_short_prompt_uses_the_bytes_it_may():
    blocks = TierRule("mixed", N, 57, 0.25, by_bytes=True).blocks(0.9, 10, 132)
    assert blocks == TierBlocks(9, 0)  # 3 quantized blocks would hold everything, less exactly


@given(ratios, lengths, st.integers(0, 300), st.floats(0.01, 1.0), st.booleans(), st.data())
def test_no_shorter_prompt_needs_more_than_the_most(ratio, most, protected, share, by_bytes, data):
    rule = PrefixRule(
        ratio, 0, protected, 0, block_size=N, tiers=TierRule("mixed", N, 28, share, by_bytes)
    )
    shorter = data.draw(st.integers(1, most))
    plan = rule.plan(shorter * N)
    assert plan is None or plan.num_compressed_blocks <= rule.max_compressed_blocks(most * N)


@given(lengths, st.floats(0.01, 0.99))
def test_all_bytes_are_all_in_full_precision(num_blocks, share):
    blocks = TierRule("mixed", N, Q, share, by_bytes=True).blocks(1.0, num_blocks, 20)
    assert blocks == TierBlocks(num_blocks, 0)


def test_bytes_that_are_over_hold_more_in_full_precision():
    rule = TierRule("mixed", N, Q, full_share=0.1, by_bytes=True)
    blocks = rule.blocks(0.5, 240, 20)  # everything quantized would take 64 blocks
    assert blocks.total == 120
    assert blocks.full * N + blocks.quantized * Q >= 240 * N
    assert blocks.full > 0.1 * 120


def rule_of(mode, ratio, **tiers):
    return PrefixRule(
        ratio, 0, sink_tokens=4, recent_tokens=16, block_size=N, tiers=TierRule(mode, N, Q, **tiers)
    )


def test_the_plan_says_what_lies_in_which_tier():
    plan = rule_of("mixed", 0.125, full_share=0.25, by_bytes=True).plan(120 * N + 3)
    assert (plan.num_full_blocks, plan.num_quantized_blocks) == (4, 11)
    assert plan.quantized_tokens == 11 * Q
    assert plan.full_share == pytest.approx(4 / 120)
    assert plan.share == pytest.approx((4 * N + 11 * Q) / (120 * N))
    assert plan.num_freed_blocks == 105


def test_quantized_tokens_are_never_more_than_there_are():
    plan = rule_of("quantize", 1.0).plan(121 * N)
    assert plan.num_quantized_blocks * Q > plan.boundary_tokens
    assert plan.quantized_tokens == plan.boundary_tokens
    assert plan.share == 1.0


def test_a_prompt_that_would_not_shrink_is_left_alone():
    assert rule_of("quantize", 1.0).skip_reason(N) == "nothing_to_free"
    assert rule_of("quantize", 1.0).skip_reason(3 * N) is None


def test_a_requests_ratio_is_in_the_servers_measure():
    options = RequestOptions(keep_ratio=0.5)
    by_bytes = rule_of("mixed", 0.125, full_share=0.25, by_bytes=True).plan(120 * N, options)
    by_tokens = rule_of("mixed", 0.125, full_share=0.25).plan(120 * N, options)
    assert by_bytes.num_compressed_blocks == 60
    assert by_tokens.share == pytest.approx(0.5, abs=0.05)


def test_a_profiles_shares_are_linear_between_its_ratios():
    rule = TierRule("mixed", N, Q, 0.25, by_bytes=True, shares=((0.1, 0.2), (0.3, 0.6)))
    assert [rule.full_share_at(r) for r in (0.05, 0.1, 0.2, 0.3, 0.9)] == pytest.approx(
        [0.2, 0.2, 0.4, 0.6, 0.6]
    )
    assert rule.blocks(0.1, 200, 20) == TierBlocks(4, 16)
    assert TierRule("mixed", N, Q, 0.25).full_share_at(0.1) == 0.25


@given(ratios, lengths, st.integers(0, 200), st.sampled_from(["quantize", "mixed"]), st.booleans())
def test_smaller_pages_need_no_other_blocks(ratio, num_blocks, protected, mode, by_bytes):
    """Head pages in four parts hold the same tokens, and every head's protected ones."""
    whole = TierRule(mode, N, Q, 0.3, by_bytes).blocks(ratio, num_blocks, protected)
    parts = TierRule(mode, N, Q // 4, 0.3, by_bytes, split=4).blocks(ratio, num_blocks, protected)
    assert parts == whole
    if parts.full * N < min(protected, num_blocks * N):
        assert parts.quantized * 4 >= ceil(min(protected, num_blocks * N) / (Q // 4))


@pytest.mark.parametrize(
    ("block", "itemsize", "name", "split", "tokens"),
    [(16, 2, "nf4", 2, 30), (32, 2, "nf4", 4, 30), (32, 4, "nf4", 8, 30), (16, 2, "int8", 1, 30)],
)
def test_a_quantized_page_holds_about_as_many_tokens_as_an_ordinary_one(
    block, itemsize, name, split, tokens
):
    chosen = choose_quantization(
        page_bytes=2 * block * 64 * itemsize, head_dim=64, keys=name, values=name, rotation="auto"
    )
    assert (chosen.split, chosen.layout.page_tokens) == (split, tokens)
    pool = torch.zeros(5, 2 * block * 64 * itemsize, dtype=torch.uint8)
    ids = chosen.page_ids(torch.tensor([3, 0]))
    assert ids.tolist() == [*range(3 * split, 4 * split), *range(split)]
    chosen.pages_of(pool)[ids] = 1
    assert pool[[0, 3]].eq(1).all() and pool[[1, 2, 4]].eq(0).all()
