"""At keep ratio 1.0 outputs equal stock vLLM's, and so do those of prompts under the threshold."""

import numpy as np
import pytest
from engine_job import Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

MAX_MODEL_LEN, MAX_TOKENS = 2048, 70  # long enough to fill two more blocks
BOUNDARIES = [n for k in (1, 2, 3, 4, 8, 16, 32) for n in (32 * k - 1, 32 * k, 32 * k + 1)]
BOUNDARIES += [n for k in (1, 2, 7, 12) for n in (128 * k - 1, 128 * k, 128 * k + 1)]
LIMIT = MAX_MODEL_LEN - MAX_TOKENS
OTHERS = [1, 2, 5, 17, 50, 77, 200, 300, 450, 700, 1100, 1300, 1500, 1700, 1900, LIMIT - 1, LIMIT]
LENGTHS = sorted({*OTHERS, *BOUNDARIES})


def mixed_requests():
    rng = np.random.default_rng(5)
    lengths = [*LENGTHS, *rng.integers(3, 1000, 12).tolist()]
    prompts = [
        make_context(rng, n).tokens.tolist() if n >= 3 else rng.integers(7, 512, n).tolist()
        for n in rng.permutation(lengths).tolist()
    ]
    return [Request(prompt, MAX_TOKENS, options={"logprobs": 0}) for prompt in prompts]


@pytest.fixture(scope="module", params=[pytest.param(32, marks=pytest.mark.versions), 128])
def runs(request):
    """Stock and keep ratio 1.0 on the same requests, in chunks and batches."""
    requests = mixed_requests()
    options = {
        "block_size": request.param,
        "max_num_batched_tokens": 1024,
        "max_model_len": MAX_MODEL_LEN,
    }
    stock = run_job(requests, **options)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0, "min_prompt_tokens": 0}, **options)
    return requests, stock, whole, request.param


def test_keep_ratio_one_is_token_identical(runs):
    requests, stock, whole, block_size = runs
    assert len(requests) >= 50
    assert whole.outputs == stock.outputs
    compressed = sum(len(request.prompt) >= block_size for request in requests)
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] == compressed
    assert compressed > 30


def test_log_probabilities_agree(runs):
    _, stock, whole, _ = runs
    for mine, theirs in zip(whole.logprobs, stock.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-3)


def test_every_block_is_back(runs):
    _, stock, whole, _ = runs
    assert whole.free_blocks[-1] == whole.free_blocks[0] == stock.free_blocks[0]


def test_prompts_under_the_threshold_are_left_alone():
    rng = np.random.default_rng(6)
    requests = [Request(make_context(rng, n).tokens.tolist()) for n in (10, 64, 255, 100)]
    stock = run_job(requests)
    below = run_job(requests, kvzip={"keep_ratio": 0.1})
    assert below.outputs == stock.outputs
    assert below.free_blocks == stock.free_blocks
    assert below.metrics["vllm_kvzip_requests_compressed_total"] == 0
    assert below.metrics["vllm_kvzip_requests_skipped_total/below_min_prompt_tokens"] == 4
    assert stock.classes == {
        "backend": "CPUAttentionBackend",
        "spec": "FullAttentionSpec",
        "manager": "FullAttentionManager",
        "scheduler": "Scheduler",
        "worker": "CPUWorker",
        "runner": "vllm.v1.worker.cpu_model_runner",
    }
    assert stock.metrics == {}


def copies(*lengths):
    rng = np.random.default_rng(7)
    contexts = [make_context(rng, length, 0.6) for length in lengths]
    return [Request(copy_prompt(context, 40)[0], 100) for context in contexts]


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 4,
                    "prompt_lookup_max": 4,
                    "prompt_lookup_min": 2,
                }
            },
            {},
        ),
        ({"max_num_batched_tokens": 40, "max_num_seqs": 4}, {"scorer": "window"}),
        ({"max_num_seqs": 2, "enforce_eager": False}, {"scorer": "random", "budget": "adaptive"}),
    ],
    ids=["ngram speculation", "chunks across the observation window", "compiled"],
)
def test_token_identity_with_other_features_on(engine, settings):
    requests = copies(300, 512, 700, 1024, 60, 1300)
    stock = run_job(requests)
    whole = run_job(
        requests, kvzip={"keep_ratio": 1.0, "min_prompt_tokens": 0, **settings}, **engine
    )
    assert whole.outputs == stock.outputs
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] == len(requests)
    assert whole.free_blocks[-1] == whole.free_blocks[0]
    if "speculative_config" in engine:
        assert len(whole.free_blocks) < 0.5 * len(stock.free_blocks)  # it did speculate
