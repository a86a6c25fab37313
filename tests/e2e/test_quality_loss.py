"""Each prompt keeps what its quality loss asks for, on a real engine, and the rest goes back."""

import numpy as np
import pytest
from engine_job import Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, make_context, question_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, TOKENS = 32, 768
KVZIP = {"quality_loss": 0.05, "keep_ratio": 0.9, "min_prompt_tokens": 128}
ENGINE = {"num_gpu_blocks_override": 260, "max_model_len": 1024}
DENSITIES = (0.1, 0.5, 0.9)
ASKED = 6  # questions about each context
WHOLE = {"kvzip_quality_loss": 1e-9, "kvzip_keep_ratio": 1.0}


def contexts():
    rng = np.random.default_rng(23)
    return [make_context(rng, TOKENS, density) for density in DENSITIES]


def questions(context):
    keys = list(context.facts)[:: max(1, len(context.facts) // ASKED)][:ASKED]
    return [question_prompt(context, key) for key in keys]


def requests():
    """Each context alone, then its questions; the dense one without promise, and whole; two prompts
    of one word each, with a promise of their own; a short one.
    """
    declared = {"kvzip_context_tokens": TOKENS}
    found = [
        Request(context.tokens.tolist(), 12, options={"extra_args": declared})
        for context in contexts()
    ]
    for context in contexts():
        for prompt, _ in questions(context):
            found.append(Request(prompt, 8, arrives=30, options={"extra_args": declared}))
    dense, (prompt, _) = contexts()[-1], questions(contexts()[-1])[0]
    for more in ({"kvzip_quality_loss": "off"}, WHOLE):
        options = {"extra_args": {**declared, **more}}
        found.append(Request(dense.tokens.tolist(), 12, arrives=60, options=options))
    own = {"extra_args": {"kvzip_quality_loss": 1.0}}
    for word in (VOCABULARY.ids["."], int(VOCABULARY.filler[3])):
        found.append(Request([word] * TOKENS, 12, arrives=60, options=own))
    return [*found, Request(prompt[-100:], 16, arrives=60)]


OFF, ALL, PERIODS, WORDS, SHORT = range(-5, 0)


@pytest.fixture(scope="module")
def stock():
    return run_job(requests(), **ENGINE)


@pytest.fixture(scope="module")
def promised():
    return run_job(requests(), kvzip=KVZIP, asynchronous=True, watch_hashed_blocks=True, **ENGINE)


def test_prompts_keep_what_their_promise_asks_for(promised):
    told = promised.told[: len(DENSITIES)]
    assert all(0 < one["estimated_loss"] <= KVZIP["quality_loss"] for one in told)
    assert all(0 < one["keep_ratio"] < KVZIP["keep_ratio"] for one in told)
    assert 0 < 2 * promised.told[PERIODS]["keep_ratio"] < promised.told[WORDS]["keep_ratio"]
    assert KVZIP["quality_loss"] < promised.told[WORDS]["estimated_loss"] <= 1.0
    assert promised.metrics["vllm_kvzip_estimated_loss_count"] == len(DENSITIES) + 3


def test_no_more_is_held_than_is_told(promised):
    for number, one in enumerate(promised.told[: len(DENSITIES)]):
        last = [held[str(number)] for held in promised.held_blocks if str(number) in held][-1]
        assert last == one["blocks_held"] + 1  # and a block of the answer
    freed = sum(
        one["blocks_before"] - one["blocks_held"]
        for one in promised.told
        if one is not None and "blocks_held" in one
    )
    shared = sum(len(questions(context)) for context in contexts())
    assert promised.metrics["vllm_kvzip_prefix_hits_total"] == shared
    per_context = [one["blocks_before"] - one["blocks_held"] for one in promised.told[:3]]
    own = freed - sum(n * len(questions(c)) for n, c in zip(per_context, contexts(), strict=True))
    assert promised.metrics["vllm_kvzip_blocks_freed_total"] == own


def test_questions_over_what_is_kept_are_answered(promised):
    wanted = [value for context in contexts() for _, value in questions(context)]
    answers = promised.outputs[len(DENSITIES) : len(DENSITIES) + len(wanted)]
    right = [answer[0] == value for answer, value in zip(answers, wanted, strict=True)]
    assert np.mean(right) > 0.9


def test_without_a_promise_the_keep_ratio_decides(promised):
    told = promised.told[OFF]
    assert "estimated_loss" not in told
    assert told["blocks_held"] == round(KVZIP["keep_ratio"] * TOKENS / BLOCK)


def test_a_promise_of_nothing_keeps_everything_and_changes_no_token(promised, stock):
    assert promised.told[ALL]["blocks_held"] == TOKENS // BLOCK
    for number in (ALL, SHORT):
        assert promised.outputs[number] == stock.outputs[number]


def test_every_block_comes_back_and_none_of_the_cache_is_written(promised):
    assert promised.free_blocks[-1] == promised.free_blocks[0]
    assert promised.written_hashed_blocks == []
    assert promised.compared_hashed_blocks["compressed"] > 0
