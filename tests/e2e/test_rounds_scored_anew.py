"""Rounds whose scorer looks at kept pairs again, and at the queries of the last decode steps."""

import numpy as np
import pytest
from engine_job import RUNNER_V2, Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KVZIP = {"scorer": "redundancy", "min_prompt_tokens": 512, "decode_budget": 96}
ENGINE = {"max_model_len": 512, "num_gpu_blocks_override": 80, "max_num_batched_tokens": 128}
LENGTH, WITHIN, LONG = 40, 60, 300


def requests():
    rng = np.random.default_rng(43)
    prompt = make_context(rng, LENGTH).tokens.tolist()
    return [Request(prompt, WITHIN), Request(prompt, LONG, arrives=3)]


def num_rounds(report):
    return report.metrics["vllm_kvzip_decode_rounds_total"]


@pytest.fixture(scope="module")
def answers():
    return run_job(requests(), kvzip=KVZIP, asynchronous=True, **ENGINE)


def test_rounds_run_and_every_block_comes_back(answers):
    assert [len(output) for output in answers.outputs] == [WITHIN, LONG]
    first, step = 96 + 32, 32
    assert num_rounds(answers) == (LENGTH + LONG - 1 - first) // step + 1
    assert answers.free_blocks[-1] == answers.free_blocks[0]


def test_an_answer_within_its_budget_is_that_of_stock_vllm(answers):
    stock = run_job(requests()[:1], **ENGINE)
    assert answers.outputs[0] == stock.outputs[0]


def test_model_runner_v2_shows_the_same_queries(answers):
    on_v2 = run_job(requests(), kvzip=KVZIP, environment=RUNNER_V2, **ENGINE)
    assert on_v2.outputs == answers.outputs
    assert num_rounds(on_v2) == num_rounds(answers)
    assert on_v2.free_blocks[-1] == on_v2.free_blocks[0]


def test_beside_guesses(answers):
    guess = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}
    report = run_job(requests(), kvzip=KVZIP, speculative_config=guess, **ENGINE)
    assert [len(output) for output in report.outputs] == [WITHIN, LONG]
    assert report.outputs[0] == answers.outputs[0]
    assert len(report.free_blocks) < 0.9 * LONG  # steps: guesses were right
    assert num_rounds(report) > 3
    assert report.free_blocks[-1] == report.free_blocks[0]
