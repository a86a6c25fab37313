"""Our Triton kernel inside real vLLM, on vLLM's own cache, interpreted; under both model runners.

Decode, chunked prefill, and questions of several tokens over a cached compressed prefix.
"""

import numpy as np
import pytest
from engine_job import RUNNER_V2, Request, run_job
from retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TRITON = {"TRITON_INTERPRET": "1"}
SETTINGS = {"min_prompt_tokens": 32, "scorer": "keydiff"}


def requests():
    """Three prompts and one below the threshold; then a question, and a prompt that is cut."""
    rng = np.random.default_rng(7)
    prompts = [make_context(rng, length).tokens.tolist() for length in (70, 96, 140, 20)]
    question = prompts[2] + make_context(rng, 21).tokens.tolist()
    later = [Request(question, 5, arrives=10), Request(prompts[0] + prompts[1], 5, arrives=11)]
    return [Request(prompt, 7) for prompt in prompts] + later


def run(kvzip, environment=None, **engine):
    return run_job(requests(), kvzip, environment, max_num_batched_tokens=96, **engine)


@pytest.fixture(scope="module")
def stock():
    return run(None)


def test_keep_ratio_one_is_token_identical_under_runner_v2(stock):
    whole = run({**SETTINGS, "keep_ratio": 1.0}, RUNNER_V2, triton_attention=True)
    assert whole.classes["batcher"] == "KernelBatcher"
    assert whole.outputs == stock.outputs
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] >= 4
    assert whole.metrics["vllm_kvzip_prefix_hits_total"] >= 1
    assert whole.free_blocks[-1] == whole.free_blocks[0] == stock.free_blocks[0]


def test_what_is_kept_is_read_as_by_vllms_kernel_under_runner_v1(stock):
    settings = {**SETTINGS, "keep_ratio": 0.4}
    ours = run(settings, TRITON, triton_attention=True)
    theirs = run(settings)
    assert ours.outputs == theirs.outputs != stock.outputs
    assert ours.held_blocks == theirs.held_blocks
