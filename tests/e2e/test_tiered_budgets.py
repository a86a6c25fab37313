"""Budgets in tokens with quantized pages: rounds in bytes, and what a request needs stays.

The tiny model goes on after any prompt, so an answer is as long as it is asked to be.
"""

import numpy as np
import pytest
from engine_job import Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context, question_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, BUDGET_BLOCKS, ROUND_BLOCKS = 32, 4, 2
BUDGET = BUDGET_BLOCKS * BLOCK
ENGINE = {
    "dtype": "bfloat16", "num_gpu_blocks_override": 36, "max_model_len": 800,
    "max_num_batched_tokens": 256,
}  # fmt: skip
COPIED = 120
OFF = {"extra_args": {"kvzip": "off"}}
WITHIN, SHORT, LONG, COPY = range(4)


def requests():
    rng = np.random.default_rng(47)

    def plain(length, output, **more):
        return Request(make_context(rng, length, 0.3).tokens.tolist(), output, **more)

    found = [plain(280, 40), plain(60, 60), plain(40, 460)]
    found.append(Request(copy_prompt(make_context(rng, 420, 0.3), 150)[0], COPIED))
    # One too many for the pool.
    return found + [plain(120, 120, arrives=20, options=OFF) for _ in range(3)]


def copied_right(report):
    """Share of the context's tokens that its copy has right."""
    rng = np.random.default_rng(47)
    for length in (280, 60, 40):
        make_context(rng, length, 0.3)
    wanted = copy_prompt(make_context(rng, 420, 0.3), 150, num_answer_tokens=COPIED)[1]
    return np.mean([a == b for a, b in zip(report.outputs[COPY], wanted, strict=True)])


def long_questions():
    """About facts all over prompts that are longer than the pool."""
    rng = np.random.default_rng(48)
    asked, answers = [], []
    for length in (1500, 1200):
        context = make_context(rng, length, 0.1)
        key = list(context.facts)[len(context.facts) // 3]
        asked.append(Request(list(question_prompt(context, key)[0]), 8))
        answers.append(context.facts[key])
    return asked, answers


@pytest.fixture(scope="module", params=["mixed", "quantize"])
def mode(request):
    return request.param


@pytest.fixture(scope="module")
def within_budget(mode):
    kvzip = {"mode": mode, "decode_budget": BUDGET}
    return run_job(requests(), kvzip=kvzip, asynchronous=True, **ENGINE)


def test_answers_are_as_long_as_asked_and_every_block_comes_back(within_budget):
    assert [len(output) for output in within_budget.outputs] == [
        request.max_tokens for request in requests()
    ]
    assert within_budget.free_blocks[-1] == within_budget.free_blocks[0]
    assert within_budget.num_preemptions > 0


def test_nobody_holds_more_than_the_bytes_of_the_budget(within_budget):
    held = [row[str(LONG)] for row in within_budget.held_blocks if str(LONG) in row]
    between = BUDGET_BLOCKS + ROUND_BLOCKS + 1
    assert max(held) <= between + BUDGET_BLOCKS  # in the steps of a round
    assert np.mean([count > between for count in held]) < 0.05
    assert np.median(held) > BUDGET_BLOCKS - 1
    assert within_budget.metrics["vllm_kvzip_decode_rounds_total"] >= 4


def test_what_the_answer_needs_is_kept(within_budget):
    """The copy reads its context, of more than three budgets, after it was compressed."""
    assert copied_right(within_budget) > 0.7


def test_answers_within_the_budget_are_those_without_one(mode, within_budget):
    without = run_job(requests()[: SHORT + 1], kvzip={"mode": mode}, **ENGINE)
    assert without.metrics["vllm_kvzip_requests_compressed_total"] == 1
    assert within_budget.outputs[: SHORT + 1] == without.outputs


def test_prompts_longer_than_the_pool_are_answered():
    asked, answers = long_questions()
    kvzip = {"mode": "mixed", "prefill_budget": 10 * BLOCK, "keep_ratio": 0.5}
    pool = {**ENGINE, "num_gpu_blocks_override": 40, "max_model_len": 1600}
    report = run_job(asked, kvzip=kvzip, **pool)
    right = [output[0] == answer for output, answer in zip(report.outputs, answers, strict=True)]
    assert all(right)
    assert report.metrics["vllm_kvzip_prefill_rounds_total"] > 10
    assert max(count for row in report.held_blocks for count in row.values()) <= 2 * 10 + 5 + 1
    assert report.free_blocks[-1] == report.free_blocks[0]
