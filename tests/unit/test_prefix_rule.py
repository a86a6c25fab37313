"""What is compressed, and into how many blocks."""

from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from most_held import most_blocks

from vllm_kvzip.metrics import SKIP_REASONS
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import DEFAULT, RequestOptions

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
    assert plan.num_protected_tokens <= plan.num_compressed_blocks * prefix_rule.block_size
    floor = plan.min_pages_per_head
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
    assert picky.skip_reason(1024) is None  # the number of output tokens is unknown


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
    floor = plan.min_pages_per_head
    assert plan.num_compressed_blocks <= max(floor, ceil(wanted * plan.num_prefix_blocks))


def test_what_fits_the_pool_uncompressed():
    """Without a prefill budget a longer request is never admitted."""
    budgeted = rule(prefill_blocks=8, pool_blocks=21)
    assert budgeted.fits_uncompressed(640)
    assert not budgeted.fits_uncompressed(641)
    assert rule(pool_blocks=21).fits_uncompressed(641)


def test_protected_tokens_never_exceed_the_prefix():
    def protected(num_tokens, **settings):
        plan = rule(keep_ratio=1.0, min_prompt_tokens=0, **settings).plan(num_tokens)
        return plan.num_sink_tokens, plan.num_recent_tokens

    assert protected(1024) == (4, 16)
    assert protected(32, recent_tokens=64) == (4, 28)
    assert protected(32, sink_tokens=64) == (32, 0)


@pytest.mark.parametrize(("num_tokens", "prefill_blocks"), [(96, None), (500, 2)])
def test_a_plan_says_which_tokens_are_protected_in_its_prefix(num_tokens, prefill_blocks):
    """Also the plan of a round: with a prefill budget the long prompt has several."""
    asked = rule(sink_tokens=40, recent_tokens=20, keep_ratio=0.5, prefill_blocks=prefill_blocks)
    plan = asked.next_plan(num_tokens)
    assert (plan.num_prefix_blocks, plan.is_round) == (3, prefill_blocks is not None)
    assert (plan.num_sink_tokens, plan.num_recent_tokens) == (40, 20)
    assert (plan.num_protected_tokens, plan.min_pages_per_head) == (60, 2)


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


def rounds(budgeted, num_prompt_tokens, num_tokens, options=DEFAULT):
    """Everything that is compressed until ``num_tokens`` are computed."""
    plans, done = [], None
    while (plan := budgeted.next_plan(num_prompt_tokens, options, done)) is not None:
        if plan.ready_tokens > num_tokens:
            break
        plans.append(plan)
        done = plan
    return plans


def test_a_prompt_beyond_its_budget_is_compressed_while_it_is_read():
    """Eight blocks are kept, and room is made after every four more."""
    budgeted = rule(keep_ratio=0.3, prefill_blocks=8)
    plans = rounds(budgeted, 683, 683)
    assert [(p.start_blocks, p.num_prefix_blocks) for p in plans] == [
        (0, 12), (12, 16), (16, 20), (20, 21),
    ]  # fmt: skip
    assert [p.held_blocks for p in plans] == [0, 8, 8, 8]
    assert [p.num_compressed_blocks for p in plans] == [8, 8, 8, 7]  # at last, 0.3 of 21 blocks
    assert [p.is_round for p in plans] == [True, True, True, False]
    assert [p.ready_tokens for p in plans] == [384, 512, 640, 683]
    assert [p.num_freed_blocks for p in plans] == [4, 4, 4, 2]
    assert plans[-1].num_saved_blocks == 21 - 7
    assert plans[-1].share == 0.3
    assert plans[0].share == 8 / 12


def test_a_budget_does_nothing_to_prompts_within_it():
    within, without = rule(prefill_blocks=8), rule()
    for num_tokens in (1, 63, 64, 200, 383, 384, 385):
        assert rounds(within, num_tokens, num_tokens) == rounds(without, num_tokens, num_tokens)
    assert rounds(within, 1024, 1024, RequestOptions(is_off=True)) == []


def test_what_is_generated_is_compressed_too():
    budgeted = rule(keep_ratio=0.3, prefill_blocks=8)
    plans = rounds(budgeted, 300, 700)
    assert [(p.start_blocks, p.held_blocks, p.num_prefix_blocks) for p in plans] == [
        (0, 0, 9), (9, 3, 16), (16, 8, 20),
    ]  # fmt: skip


def written(budgeted, options, num_prompt_tokens, num_generated):
    """Tokens that are computed at last, and all that is compressed until then."""
    if options.max_output_tokens is not None:
        num_generated = min(num_generated, options.max_output_tokens)
    num_tokens = num_prompt_tokens + num_generated
    return num_tokens, rounds(budgeted, num_prompt_tokens, num_tokens, options)


def check_chain(plans, num_tokens, most):
    """Each compression goes on where the last one ended, and never are more than ``most`` held.

    Returns the blocks of 16 tokens that are held at last.
    """
    start = held = 0
    for plan in plans:
        assert (plan.start_blocks, plan.held_blocks) == (start, held)
        candidates = held + plan.num_prefix_blocks - start
        assert plan.num_source_blocks == candidates
        assert candidates + plan.num_compressed_blocks <= most
        start, held = plan.num_prefix_blocks, plan.num_compressed_blocks
    held += num_tokens // 16 - start
    assert held <= most
    assert sum(not plan.is_round for plan in plans) <= 1
    return held


BUDGETED = st.builds(
    PrefixRule,
    keep_ratio=st.floats(0.01, 1.0),
    min_prompt_tokens=st.integers(0, 300),
    sink_tokens=st.integers(0, 8),
    recent_tokens=st.integers(0, 8),
    block_size=st.just(16),
    prefill_blocks=st.integers(2, 40),
)


@given(BUDGETED, OPTIONS, st.integers(1, 5000), st.integers(0, 2000))
def test_with_a_budget_no_request_holds_more(budgeted, options, num_prompt, num_generated):
    num_tokens, plans = written(budgeted, options, num_prompt, num_generated)
    if options.is_off:
        assert not plans
        return
    check_chain(plans, num_tokens, budgeted.peak_blocks)
    for plan in plans:
        most = min(plan.num_source_blocks, budgeted.prefill_blocks)
        assert plan.num_compressed_blocks <= most
        assert not plan.is_round or plan.num_freed_blocks > 0


def test_an_answer_is_compressed_into_its_budget():
    """The prompt is compressed as without one; eight blocks are kept after every four more."""
    budgeted = rule(keep_ratio=0.3, decode_blocks=8)
    plans = rounds(budgeted, 300, 800)
    assert plans[0] == rule(keep_ratio=0.3).plan(300)
    assert [(p.start_blocks, p.held_blocks, p.num_prefix_blocks) for p in plans] == [
        (0, 0, 9), (9, 3, 18), (18, 8, 22),
    ]  # fmt: skip
    assert [p.is_round for p in plans] == [False, True, True]
    short = rounds(budgeted, 40, 800)  # left alone until its answer is long
    assert [(p.start_blocks, p.held_blocks, p.num_prefix_blocks) for p in short] == [
        (0, 0, 12), (12, 8, 16), (16, 8, 20), (20, 8, 24),
    ]  # fmt: skip


def test_a_prompt_that_keeps_more_than_the_decode_budget_is_squeezed_behind_its_end():
    plans = rounds(rule(keep_ratio=0.5, decode_blocks=8), 2000, 2200)
    assert [(p.num_prefix_blocks, p.num_compressed_blocks) for p in plans] == [
        (62, 31), (63, 8), (67, 8),
    ]  # fmt: skip


def test_a_request_may_name_its_own_decode_budget():
    budgeted, ask = rule(keep_ratio=0.3, decode_blocks=8), RequestOptions
    assert [p.num_compressed_blocks for p in rounds(budgeted, 40, 400, ask(decode_budget=128))] == [
        4
    ] * 4
    assert rounds(budgeted, 40, 4000, ask(decode_budget=0)) == []
    assert rounds(budgeted, 40, 4000, ask(is_off=True)) == []
    assert budgeted.decode_budget(ask(decode_budget=1)) == 2
    assert rule().decode_budget(ask(decode_budget=128)) is None
    within = rule(prefill_blocks=6, decode_blocks=8)
    assert within.decode_budget(ask()) == within.decode_budget(ask(decode_budget=0)) == 6
    assert within.decode_budget(ask(decode_budget=128)) == 4


def test_an_answer_that_ends_before_its_budget_is_full_plans_nothing():
    budgeted = rule(keep_ratio=0.3, decode_blocks=8)
    assert budgeted.next_plan(40, RequestOptions(max_output_tokens=344)) is None
    assert budgeted.next_plan(40, RequestOptions(max_output_tokens=345)).num_prefix_blocks == 12


def test_a_round_waits_until_no_token_before_it_is_a_guess():
    plans = rounds(rule(keep_ratio=0.3, decode_blocks=8, num_guessed_tokens=6), 40, 800)
    assert [(p.boundary_tokens, p.ready_tokens) for p in plans] == [
        (384, 390), (512, 518), (640, 646), (768, 774),
    ]  # fmt: skip
    prompt = rounds(rule(keep_ratio=0.3, prefill_blocks=8, num_guessed_tokens=6), 683, 683)
    assert [p.ready_tokens for p in prompt] == [384, 512, 640, 683]  # nobody guesses a prompt


DECODING = st.builds(
    PrefixRule,
    keep_ratio=st.floats(0.01, 1.0),
    min_prompt_tokens=st.integers(0, 300),
    sink_tokens=st.integers(0, 8),
    recent_tokens=st.integers(0, 8),
    block_size=st.just(16),
    prefill_blocks=st.none() | st.integers(2, 40),
    decode_blocks=st.integers(2, 40),
    num_guessed_tokens=st.integers(0, 20),
)


@given(DECODING, OPTIONS, st.integers(1, 2000), st.integers(0, 3000))
def test_with_a_decode_budget_no_answer_holds_more(budgeted, options, num_prompt, num_generated):
    num_tokens, plans = written(budgeted, options, num_prompt, num_generated)
    if (budget := budgeted.decode_budget(options)) is None:
        assert not any(plan.is_round for plan in plans)
        return
    held = check_chain(plans, num_tokens, most_blocks(budgeted, num_prompt, options))
    for plan in plans:
        assert plan.num_prefix_blocks > plan.start_blocks
        if plan.is_round and plan.ready_tokens > num_prompt:
            assert plan.num_compressed_blocks == budget < plan.num_source_blocks
    if num_tokens - num_prompt > 16 * (budget + 2) and any(plan.is_round for plan in plans):
        assert held <= budget + max(1, budget // 2) + 1


@given(BUDGETED, st.integers(1, 3000), st.integers(1, 3000))
def test_equal_prefixes_are_compressed_alike_whatever_follows(budgeted, one, other):
    """Up to the end of the shorter prompt, where its own last compression may differ."""
    shorter = min(one, other)
    found = [
        [p for p in rounds(budgeted, length, shorter - 16) if p.is_round] for length in (one, other)
    ]
    assert found[0] == found[1]
