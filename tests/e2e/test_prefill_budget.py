"""Prompts are compressed while they are read: longer than the pool, in bounded memory."""

import numpy as np
import pytest
from engine_job import Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context, question_prompt
from vllm_kvzip.planning.prefix_seed import checksum, prefix_seed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, POOL_BLOCKS = 32, 40
BUDGET_BLOCKS, ROUND_BLOCKS = 10, 5
BUDGET = {"keep_ratio": 0.3, "prefill_budget": BUDGET_BLOCKS * BLOCK + 7}
PEAK = 2 * BUDGET_BLOCKS + ROUND_BLOCKS + 1
SMALL = {
    "num_gpu_blocks_override": POOL_BLOCKS, "max_model_len": 2048, "max_num_batched_tokens": 384,
}  # fmt: skip


def asked(rng, *lengths):
    """Requests about a fact in the middle, and the right answers."""
    requests, answers = [], []
    for length in lengths:
        context = make_context(rng, length, 0.1)
        key = list(context.facts)[len(context.facts) // 2]
        requests.append(Request(list(question_prompt(context, key)[0]), 40))
        answers.append(context.facts[key])
    return requests, answers


def num_rounds(num_tokens):
    """Positions in blocks at which room is made: 15, 20, 25, ... before the last block."""
    return len(range(BUDGET_BLOCKS + ROUND_BLOCKS, num_tokens // BLOCK, ROUND_BLOCKS))


@pytest.fixture(scope="module")
def long_prompts():
    requests, answers = asked(np.random.default_rng(21), 1900, 1400, 1990, 1650, 700, 300, 1800)
    requests.append(Request(requests[2].prompt, 40, arrives=60))  # aborted while it is read
    requests[-1].aborts = 63
    answers.append(None)
    # A scorer that loses none of these facts, so that a lost one is the fault of the rounds.
    kvzip = {**BUDGET, "scorer": "contrast"}
    return requests, answers, run_job(requests, kvzip=kvzip, **SMALL)


def test_prompts_longer_than_the_pool_are_served_and_answered(long_prompts):
    requests, answers, report = long_prompts
    assert len(requests[0].prompt) > POOL_BLOCKS * BLOCK
    found = [output[:1] == [answer] for output, answer in zip(report.outputs, answers, strict=True)]
    assert all(found[:-1])
    assert all(len(output) == 40 for output in report.outputs[:-1])


def test_nobody_holds_more_than_the_budget_says(long_prompts):
    _, _, report = long_prompts
    held = [count for row in report.held_blocks for count in row.values()]
    assert BUDGET_BLOCKS + ROUND_BLOCKS < max(held) <= PEAK
    assert report.free_blocks[-1] == report.free_blocks[0]


def test_rounds_are_counted_and_are_no_requests(long_prompts):
    requests, _, report = long_prompts
    done = requests[:-1]
    computed = [len(request.prompt) for request in done]
    most = sum(num_rounds(length + 40) for length in computed) + num_rounds(2030)
    rounds = report.metrics["vllm_kvzip_prefill_rounds_total"]
    rounds += report.metrics["vllm_kvzip_decode_rounds_total"]  # of the 40 tokens that follow
    assert sum(map(num_rounds, computed)) <= rounds <= most
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == len(done)


def test_who_cannot_be_compressed_and_does_not_fit_ends_alone():
    requests, answers = asked(np.random.default_rng(24), 1900, 1000, 1400)
    requests[0].fault = requests[1].fault = "raises"
    report = run_job(requests, kvzip={**BUDGET, "scorer": "contrast"}, **SMALL)
    assert report.finish_reasons == ["error", "length", "length"]
    assert [output[:1] for output in report.outputs[1:]] == [[answer] for answer in answers[1:]]
    assert report.metrics["vllm_kvzip_requests_skipped_total/failed"] == 2
    assert report.free_blocks[-1] == report.free_blocks[0]


def test_a_control_that_keeps_at_random_forgets():
    requests, answers = asked(np.random.default_rng(22), *[1900] * 8)
    control = {"scorer": "random", "budget": "uniform", "profile": "none"}
    report = run_job(requests, kvzip={**BUDGET, **control}, **SMALL)
    right = [output[:1] == [answer] for output, answer in zip(report.outputs, answers, strict=True)]
    assert sum(right) < 5


def test_prompts_within_the_budget_are_read_as_without_one():
    rng = np.random.default_rng(23)
    lengths = [3, 90, 256, 400, 447, 448, 449, 470]
    requests = [Request(make_context(rng, n).tokens.tolist(), 9) for n in lengths]
    without = run_job(requests, kvzip={"keep_ratio": 0.3}, max_num_batched_tokens=384)
    within = run_job(requests, kvzip=BUDGET, **SMALL)
    assert within.outputs == without.outputs
    assert within.metrics["vllm_kvzip_prefill_rounds_total"] == 0
    whole = {"keep_ratio": 1.0, "min_prompt_tokens": 0, "prefill_budget": 512}
    stock = run_job(requests)
    assert run_job(requests, kvzip=whole).outputs == stock.outputs


def test_what_is_generated_stays_within_the_budget_too():
    request = Request(make_context(np.random.default_rng(24), 300).tokens.tolist(), 1700)
    report = run_job([request], kvzip=BUDGET, **SMALL)
    assert len(report.outputs[0]) == 1700
    assert max(count for row in report.held_blocks for count in row.values()) <= PEAK
    rounds = report.metrics["vllm_kvzip_decode_rounds_total"]
    assert rounds == num_rounds(1999) - 1  # the short prompt left room for the first


def test_how_a_prompt_is_cut_does_not_matter_and_its_context_is_shared():
    """Rounds lie at fixed positions, so chunks, neighbours and a cached start change nothing."""
    rng = np.random.default_rng(25)
    context = make_context(rng, 1600, 0.1)
    keys = list(context.facts)[:6]
    declared = {"extra_args": {"kvzip_context_tokens": 1600}}
    requests = [
        Request(list(question_prompt(context, key)[0]), 12, arrives=80 * (number > 0),
                options=declared)
        for number, key in enumerate(keys)
    ]  # fmt: skip
    room = {**SMALL, "num_gpu_blocks_override": 160}
    budget = {"keep_ratio": 0.4, "prefill_budget": 640, "scorer": "surrogate"}
    shared = run_job(requests, kvzip=budget, **room)
    assert shared.metrics["vllm_kvzip_prefix_hits_total"] == len(keys) - 1
    assert shared.cached_tokens[1:] == [1600] * (len(keys) - 1)
    (listed,) = shared.listed_prefixes
    assert listed["id"] == checksum(prefix_seed(context.tokens.tolist(), 1600))
    alone = run_job(
        requests,
        kvzip=budget,
        **{**room, "max_num_batched_tokens": 100},
        enable_prefix_caching=False,
    )
    assert alone.metrics["vllm_kvzip_prefix_hits_total"] == 0
    assert alone.outputs == shared.outputs
    right = sum(o[0] == context.facts[key] for o, key in zip(shared.outputs, keys, strict=True))
    assert right >= len(keys) - 1


def test_who_opts_out_must_fit_into_the_pool():
    prompt = make_context(np.random.default_rng(26), 1500).tokens.tolist()
    off = {"extra_args": {"kvzip": "off"}}
    with pytest.raises(RuntimeError, match='The KV cache holds 1248 tokens, and kvzip="off" keeps'):
        run_job([Request(prompt, 9, options=off)], kvzip=BUDGET, **SMALL)
    report = run_job([Request(prompt[:1200], 9, options=off)], kvzip=BUDGET, **SMALL)
    assert report.metrics["vllm_kvzip_requests_skipped_total/off_by_request"] == 1
    assert report.metrics["vllm_kvzip_prefill_rounds_total"] == 0
