"""What is decoded from a compressed cache is still right: the default against random and worse."""

import pytest
from engine_job import Request, run_job
from eval_copy import ANSWER_TOKENS, make_pairs, right_share

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module")
def shares():
    pairs = make_pairs(num_prompts=12, context_tokens=1024, seed=0)
    requests = [Request(prompt, ANSWER_TOKENS) for prompt, _ in pairs]
    settings = {
        "full": None,
        "default": {"keep_ratio": 0.5},
        "default at 0.3": {"keep_ratio": 0.3},
        "random": {"keep_ratio": 0.5, "scorer": "random", "profile": "none"},
    }
    result = {}
    for name, kvzip in settings.items():
        report = run_job(requests, kvzip=kvzip)
        result[name] = right_share(report.outputs, pairs)
        if kvzip is not None:
            assert report.metrics["vllm_kvzip_requests_compressed_total"] == len(requests)
            assert report.metrics["vllm_kvzip_blocks_freed_total"] >= 15 * len(requests)
    return result


def test_the_model_copies_without_compression(shares):
    assert shares["full"] > 0.95


def test_the_default_keeps_what_the_model_can_do(shares):
    assert shares["default"] >= 0.95 * shares["full"]
    assert shares["default at 0.3"] >= 0.95 * shares["full"]


def test_random_eviction_destroys_it(shares):
    assert shares["random"] < 0.5 * shares["default"]
