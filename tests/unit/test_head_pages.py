"""The arithmetic of head pages."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.core import CompressedPrefix
from vllm_kvzip.head_pages import HeadPageTable, PagePool, PrefixRule, deal_pages
from vllm_kvzip.metrics import SKIP_REASONS
from vllm_kvzip.request_options import RequestOptions

RULES = st.builds(
    PrefixRule,
    keep_ratio=st.floats(0.01, 1.0),
    min_prompt_tokens=st.integers(0, 300),
    sink_tokens=st.integers(0, 40),
    recent_tokens=st.integers(0, 80),
    block_size=st.sampled_from([1, 5, 16, 32, 128]),
)


OPTIONS = st.builds(
    RequestOptions,
    context_tokens=st.none() | st.integers(0, 5000),
    keep_ratio=st.none() | st.floats(0.01, 1.0),
    is_off=st.booleans(),
    max_output_tokens=st.none() | st.integers(1, 300),
)


def rule(**changes):
    values = {
        "keep_ratio": 0.25,
        "min_prompt_tokens": 64,
        "sink_tokens": 4,
        "recent_tokens": 16,
        "block_size": 32,
    }
    return PrefixRule(**{**values, **changes})


@given(RULES, st.integers(1, 5000))
def test_plan_holds_what_it_must_and_no_more(prefix_rule, num_tokens):
    plan = prefix_rule.plan(num_tokens)
    if plan is None:
        assert prefix_rule.skip_reason(num_tokens) in ("below_min_prompt_tokens", "nothing_to_free")
        return
    assert prefix_rule.skip_reason(num_tokens) is None
    assert plan.boundary_tokens == plan.num_prefix_blocks * prefix_rule.block_size
    assert 0 <= num_tokens - plan.boundary_tokens < prefix_rule.block_size
    assert 1 <= plan.num_compressed_blocks <= plan.num_prefix_blocks
    sinks, recent = prefix_rule.protected_in_prefix(plan.boundary_tokens)
    kept_tokens = plan.num_compressed_blocks * prefix_rule.block_size
    assert sinks + recent <= kept_tokens
    floor = prefix_rule.min_pages_per_head(plan.boundary_tokens)
    assert plan.num_compressed_blocks >= floor
    assert plan.num_compressed_blocks <= prefix_rule.max_compressed_blocks(num_tokens)
    wanted = prefix_rule.keep_ratio * plan.num_prefix_blocks
    assert plan.num_compressed_blocks <= max(floor, ceil(wanted))


@given(RULES, st.integers(1, 3000), st.integers(0, 500))
def test_max_compressed_blocks_bounds_every_shorter_prompt(prefix_rule, num_tokens, shorter):
    plan = prefix_rule.plan(max(1, num_tokens - shorter))
    if plan is not None:
        assert plan.num_compressed_blocks <= prefix_rule.max_compressed_blocks(num_tokens)


@pytest.mark.parametrize(
    ("num_tokens", "blocks", "compressed"),
    [(1024, 32, 8), (1023, 31, 8), (1025, 32, 8), (1056, 33, 9), (64, 2, 1), (65, 2, 1)],
)
def test_plan_around_block_boundaries(num_tokens, blocks, compressed):
    plan = rule().plan(num_tokens)
    assert plan is not None
    assert (plan.num_prefix_blocks, plan.num_compressed_blocks) == (blocks, compressed)


def test_exact_ratios_do_not_round_up():
    assert rule(keep_ratio=0.3).plan(320).num_compressed_blocks == 3


def test_skip_reasons():
    assert rule().skip_reason(63) == "below_min_prompt_tokens"
    assert rule(min_prompt_tokens=0).skip_reason(31) == "below_min_prompt_tokens"
    assert rule(keep_ratio=0.9).skip_reason(96) == "nothing_to_free"
    assert rule(keep_ratio=1.0).skip_reason(96) is None


def test_what_a_request_asks_for_decides():
    ask = RequestOptions
    assert rule().plan(1024, ask(keep_ratio=0.5)).num_compressed_blocks == 16
    assert rule().plan(1024, ask(keep_ratio=0.5)).keep_ratio == 0.5
    assert rule().plan(1024).keep_ratio == 0.25
    assert rule().skip_reason(1024, ask(is_off=True)) == "off_by_request"
    assert rule().skip_reason(1024, ask(keep_ratio=1.0)) == "nothing_to_free"
    whole = rule(keep_ratio=1.0)
    assert whole.skip_reason(1024, ask(keep_ratio=1.0)) is None
    assert whole.plan(1024, ask(keep_ratio=0.5)).num_compressed_blocks == 16


def test_short_answers_are_left_alone_unless_others_reuse_the_context():
    picky = rule(min_output_tokens=64)
    assert picky.skip_reason(1024, RequestOptions(max_output_tokens=63)) == (
        "below_min_output_tokens"
    )
    assert picky.skip_reason(1024, RequestOptions(max_output_tokens=64)) is None
    assert picky.skip_reason(1024, RequestOptions(1024, max_output_tokens=1)) is None
    assert picky.skip_reason(1024) is None  # nobody knows


def test_a_prompt_that_fits_only_without_its_compressed_prefix_is_left_alone():
    """32 blocks and 16 for what is kept, vLLM's null block, and one for what follows."""
    half = rule(keep_ratio=0.5)
    assert replace(half, pool_blocks=50).skip_reason(1024) is None
    assert replace(half, pool_blocks=49).skip_reason(1024) == "no_room"
    assert replace(half, pool_blocks=50).skip_reason(1025) == "no_room"
    much = RequestOptions(keep_ratio=0.9)
    assert replace(half, pool_blocks=50).skip_reason(1024, much) == "no_room"


@given(RULES, OPTIONS, st.integers(1, 5000), st.integers(2, 400))
def test_a_plan_fits_the_pool_and_every_refusal_has_a_name(
    prefix_rule, options, num_tokens, pool_blocks
):
    limited = replace(prefix_rule, pool_blocks=pool_blocks)
    plan, reason = limited.plan(num_tokens, options), limited.skip_reason(num_tokens, options)
    assert (plan is None) == (reason is not None)
    if plan is None:
        assert reason in SKIP_REASONS
        return
    assert not options.is_off
    assert ceil(num_tokens / prefix_rule.block_size) + plan.num_compressed_blocks < pool_blocks - 1
    wanted = prefix_rule.keep_ratio if options.keep_ratio is None else options.keep_ratio
    assert plan.keep_ratio == wanted
    floor = prefix_rule.min_pages_per_head(plan.boundary_tokens)
    assert plan.num_compressed_blocks <= max(floor, ceil(wanted * plan.num_prefix_blocks))


def test_protected_tokens_never_exceed_the_prefix():
    assert rule().protected_in_prefix(1024) == (4, 16)
    assert rule(recent_tokens=64).protected_in_prefix(32) == (4, 28)
    assert rule(sink_tokens=64).protected_in_prefix(32) == (32, 0)


@given(RULES, st.integers(1, 3000), st.integers(0, 3000), st.integers(0, 3000))
def test_a_declared_context_is_compressed_alike_whatever_follows_it(
    prefix_rule, context, question, other_question
):
    plans = [
        prefix_rule.plan(context + rest, RequestOptions(context))
        for rest in (question, other_question)
    ]
    assert plans[0] == plans[1]
    if plans[0] is not None:
        assert plans[0].ready_tokens == plans[0].boundary_tokens <= context
        whole = prefix_rule.plan(context)
        assert whole.num_compressed_blocks == plans[0].num_compressed_blocks
        assert whole.ready_tokens == context


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.data())
def test_dealing_gives_each_page_to_one_head(num_layers, num_heads, num_blocks, data):
    pool = PagePool(num_blocks=50, num_layers=num_layers, num_kv_heads=num_heads)
    blocks = data.draw(st.lists(st.integers(0, 49), min_size=num_blocks, max_size=num_blocks,
                                unique=True))  # fmt: skip
    total = num_blocks * num_layers * num_heads
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=num_layers * num_heads - 1,
                                     max_size=num_layers * num_heads - 1)))  # fmt: skip
    pages = torch.tensor([0, *cuts, total]).diff().view(num_layers, num_heads)
    ids = deal_pages(blocks, pages, pool)
    expected = {
        pool.page_id(layer, block, head)
        for layer in range(num_layers)
        for block in blocks
        for head in range(num_heads)
    }
    assert len(ids) == total
    assert set(ids.tolist()) == expected


def test_skewed_budgets_hold_the_least_possible_number_of_blocks():
    """One layer keeps everything, every other head one page."""
    num_layers, num_heads, prefix_blocks = 4, 4, 32
    pages = torch.ones(num_layers, num_heads, dtype=torch.int64)
    pages[1] = prefix_blocks
    num_blocks = ceil(int(pages.sum()) / (num_layers * num_heads))
    assert num_blocks == 9  # 4 * 32 + 12 pages in blocks of 16; dealing by head would take 32
    pool = PagePool(num_blocks=64, num_layers=num_layers, num_kv_heads=num_heads)
    assert len(deal_pages(range(num_blocks), pages, pool)) == int(pages.sum())
    with pytest.raises(ValueError, match="140 head pages asked of 8 blocks"):
        deal_pages(range(num_blocks - 1), pages, pool)


def test_page_ids_need_64_bits_in_elements_only():
    pool = PagePool(num_blocks=200_000, num_layers=80, num_kv_heads=8)
    last = pool.page_id(79, 199_999, 7)
    assert last == 200_000 * 80 * 8 - 1
    assert pool.page_ids(torch.tensor([199_999]))[79, 7, 0] == last


def test_strides_and_offset_of_other_placements():
    pool = PagePool(10, 2, 2, first_page=100, layer_stride=1000, block_stride=20)
    assert pool.page_id(1, 3, 1) == 100 + 1000 + 60 + 1
    assert pool.page_ids(torch.tensor([3]))[1, 1, 0] == pool.page_id(1, 3, 1)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.data())
def test_page_table_lists_compressed_pages_then_the_tail(num_layers, num_heads, num_reqs, data):
    pool = PagePool(num_blocks=500, num_layers=num_layers, num_kv_heads=num_heads)
    prefixes, tails = [], []
    for _ in range(num_reqs):
        counts = data.draw(st.lists(st.integers(1, 6), min_size=num_layers * num_heads,
                                    max_size=num_layers * num_heads))  # fmt: skip
        pages = torch.tensor(counts).view(num_layers, num_heads)
        prefixes.append(CompressedPrefix(torch.randint(10**4, (sum(counts),)), pages))
        tails.append(data.draw(st.lists(st.integers(0, 499), max_size=20)))
    table = HeadPageTable.build(prefixes, pool, spare_columns=2)
    for request, tail in enumerate(tails):
        cut = len(tail) // 2
        for part in (tail[:cut], tail[cut:]):
            if part:
                table.append_tail(request, torch.tensor(part))
        assert table.num_tail_blocks(request) == len(tail)
    for request, (prefix, tail) in enumerate(zip(prefixes, tails, strict=True)):
        start = 0
        for layer in range(num_layers):
            for head in range(num_heads):
                count = int(prefix.pages[layer, head])
                wanted = prefix.page_ids[start : start + count].tolist()
                wanted += [pool.page_id(layer, block, head) for block in tail]
                start += count
                row = request * num_heads + head
                assert table.table[layer, row, : len(wanted)].tolist() == wanted
                assert table.compressed_pages[layer, row] == count
