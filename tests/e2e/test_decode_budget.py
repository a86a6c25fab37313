"""Answers are compressed while they are generated: a request holds no more than its budget.

The tiny model goes on after any prompt, so an answer is as long as it is asked to be.
"""

import numpy as np
import pytest
from engine_job import RUNNER_V2, Request, run_job
from random_model import make_random_model

from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, POOL_BLOCKS = 32, 52
BUDGET_BLOCKS, ROUND_BLOCKS, OWN_BLOCKS = 10, 5, 6
KVZIP = {"keep_ratio": 0.5, "decode_budget": BUDGET_BLOCKS * BLOCK + 7}
ENGINE = {
    "num_gpu_blocks_override": POOL_BLOCKS, "max_model_len": 960, "max_num_batched_tokens": 384,
}  # fmt: skip
COPIED = 200
WITHIN, LONG, COPY, OWN, OFF, LATE, PREEMPTED = range(7)


def requests():
    rng = np.random.default_rng(41)

    def context(length):
        return make_context(rng, length, 0.3)

    def plain(length, output, **more):
        return Request(context(length).tokens.tolist(), output, **more)

    own = {"extra_args": {"kvzip_decode_budget": OWN_BLOCKS * BLOCK}}
    off = {"extra_args": {"kvzip_decode_budget": "off"}}
    found = [
        plain(90, 200),
        plain(40, 900),
        Request(copy_prompt(context(640), 150)[0], COPIED),
        plain(64, 500, options=own),
        plain(64, 500, options=off),
        plain(300, 400, arrives=20),
    ]
    # Two that do not fit beside the others for long.
    return found + [plain(60, 420, arrives=30, options=off) for _ in range(2)]


def copied_right(report):
    """Share of the context's tokens that its copy has right."""
    rng = np.random.default_rng(41)
    for length in (90, 40):
        make_context(rng, length, 0.3)
    wanted = copy_prompt(make_context(rng, 640, 0.3), 150, num_answer_tokens=COPIED)[1]
    return np.mean([a == b for a, b in zip(report.outputs[COPY], wanted, strict=True)])


@pytest.fixture(scope="module")
def stock():
    return run_job(requests(), **ENGINE)


@pytest.fixture(scope="module")
def within_budget():
    return run_job(requests(), kvzip=KVZIP, asynchronous=True, **ENGINE)


def test_answers_are_as_long_as_asked_and_every_block_comes_back(within_budget):
    assert [len(output) for output in within_budget.outputs] == [
        request.max_tokens for request in requests()
    ]
    assert within_budget.free_blocks[-1] == within_budget.free_blocks[0]
    assert within_budget.num_preemptions > 0


def test_an_answer_within_its_budget_is_that_of_stock_vllm(stock, within_budget):
    for number in (WITHIN, OFF, PREEMPTED, PREEMPTED + 1):
        assert within_budget.outputs[number] == stock.outputs[number]


@pytest.mark.parametrize(
    ("number", "budget", "rounds"),
    [(LONG, BUDGET_BLOCKS, ROUND_BLOCKS), (OWN, OWN_BLOCKS, OWN_BLOCKS // 2)],
)
def test_nobody_holds_more_than_the_budget_says(within_budget, number, budget, rounds):
    held = [row[str(number)] for row in within_budget.held_blocks if str(number) in row]
    between = budget + rounds + 1
    assert max(held) <= between + budget  # in the steps of a round
    assert np.mean([count > between for count in held]) < 0.05
    assert np.median(held) >= budget


def test_rounds_are_counted(within_budget):
    """Each after as many new blocks as the last one; the first after the budget and as many."""
    assert within_budget.metrics["vllm_kvzip_prefill_rounds_total"] == 0
    rounds = within_budget.metrics["vllm_kvzip_decode_rounds_total"]
    least = (40 + 900 - BUDGET_BLOCKS * BLOCK) // (ROUND_BLOCKS * BLOCK)
    least += (64 + 500 - OWN_BLOCKS * BLOCK) // (OWN_BLOCKS // 2 * BLOCK)
    assert rounds >= least
    assert within_budget.metrics["vllm_kvzip_requests_compressed_total"] >= 2


def test_what_the_answer_needs_is_kept_and_a_control_forgets_it(within_budget):
    """The copy reads its context long after the first round has squeezed it."""
    control = run_job(requests()[: COPY + 1], kvzip={**KVZIP, **RANDOM}, **ENGINE)
    assert copied_right(within_budget) > 0.7
    assert copied_right(control) < 0.2


def test_beside_guesses(stock):
    """A round keeps what was said, and no guess that was wrong."""
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    report = run_job(requests()[: COPY + 1], kvzip=KVZIP, speculative_config=guess, **ENGINE)
    assert report.outputs[WITHIN] == stock.outputs[WITHIN]
    assert copied_right(report) > 0.7
    assert len(report.free_blocks) < 0.8 * requests()[LONG].max_tokens  # steps: guesses were right
    assert report.metrics["vllm_kvzip_decode_rounds_total"] >= 4
    assert report.free_blocks[-1] == report.free_blocks[0]


RANDOM = {"scorer": "random", "budget": "uniform", "profile": "none"}
SMALL = {"max_model_len": 512, "num_gpu_blocks_override": 80, "max_num_batched_tokens": 128}
LEAST = {"min_prompt_tokens": 512, "decode_budget": 64, "scorer": "keydiff"}


def short(length, *outputs):
    rng = np.random.default_rng(43)
    return [Request(make_context(rng, length).tokens.tolist(), output) for output in outputs]


def test_model_runner_v2_writes_the_same_answers():
    on_v1 = run_job(short(40, 40, 230), kvzip=LEAST, **SMALL)
    on_v2 = run_job(short(40, 40, 230), kvzip=LEAST, environment=RUNNER_V2, **SMALL)
    assert on_v2.outputs == on_v1.outputs
    rounds = on_v1.metrics["vllm_kvzip_decode_rounds_total"]
    assert rounds == on_v2.metrics["vllm_kvzip_decode_rounds_total"] == (40 + 229 - 96) // 32 + 1
    assert on_v2.free_blocks[-1] == on_v2.free_blocks[0]


@pytest.mark.parametrize("kind", ["gemma3", "lfm2"])
def test_beside_windows_and_states(kind, tmp_path):
    model = make_random_model(kind, tmp_path)
    engine = {**SMALL, "model": model, "skip_tokenizer_init": True}
    if kind == "lfm2":
        engine["compilation_config"] = {"custom_ops": ["none"]}
    prompts = [[7 + number] * 40 for number in range(2)]
    asked = [Request(prompt, output) for prompt, output in zip(prompts, (40, 230), strict=True)]
    stock = run_job(asked, **engine)
    budgeted = run_job(asked, kvzip=LEAST, **engine)
    assert budgeted.outputs[0] == stock.outputs[0]
    assert budgeted.metrics["vllm_kvzip_decode_rounds_total"] > 3
    assert len(budgeted.outputs[1]) == 230
    assert budgeted.free_blocks[-1] == budgeted.free_blocks[0]
