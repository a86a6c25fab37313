"""Models of which some layers have a sliding window: full attention is compressed, they are not."""

from math import ceil

import numpy as np
import pytest
from engine_job import Request, run_job
from random_model import make_random_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK = 32
OFF = {"skip_tokenizer_init": True}


def tokens(rng, count):
    return rng.integers(3, 500, count).tolist()


def load():
    """Prompts that share a declared context, that repeat themselves, and short ones."""
    rng = np.random.default_rng(5)
    context, prompt = tokens(rng, 400), tokens(rng, 390)
    declared = {"extra_args": {"kvzip_context_tokens": 400}}
    return [
        Request(prompt, 24),
        Request(tokens(rng, 30), 24),
        Request(context + tokens(rng, 40), 24, options=declared),
        Request(tokens(rng, 700), 40),
        Request(context + tokens(rng, 50), 24, arrives=30, options=declared),
        Request(context + tokens(rng, 150), 24, arrives=34, options=declared),
        Request(prompt, 24, arrives=60),
        Request(tokens(rng, 500), 24, arrives=61, aborts=64),
    ]


@pytest.fixture(scope="module", params=["gemma3", "olmo3", "lfm2", "qwen3-next", "granite4-h"])
def model(request, tmp_path_factory):
    return make_random_model(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def runs(model):
    """Stock vLLM, keep ratio 1.0 and 0.25, by the same requests."""
    engine = {**OFF, "model": model, "max_num_batched_tokens": 256, "num_gpu_blocks_override": 240}
    asked = {"min_prompt_tokens": 64, "scorer": "random"}
    stock = run_job(load(), **engine)
    whole, quarter = (
        run_job(load(), kvzip={"keep_ratio": ratio, **asked}, watch_hashed_blocks=True, **engine)
        for ratio in (1.0, 0.25)
    )
    return stock, whole, quarter


def test_keep_ratio_one_is_token_identical(runs):
    stock, whole, _ = runs
    assert whole.outputs == stock.outputs
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] >= 4
    assert whole.classes["manager"] == "HeadPageManager"
    assert whole.classes["backend"] == "HeadPageCPUBackend"


def test_answers_depend_on_the_context(runs):
    """Else the test above would say nothing."""
    stock, _, quarter = runs
    assert len({tuple(output) for output in stock.outputs}) >= 7
    assert quarter.outputs != stock.outputs


def test_every_block_of_every_group_is_back(runs):
    for report in runs:
        assert report.free_blocks[-1] == report.free_blocks[0] == runs[0].free_blocks[0]


def test_no_hashed_block_of_any_group_is_written(runs):
    for report in runs[1:]:
        assert report.written_hashed_blocks == []
        assert report.compared_hashed_blocks["raw"] > 50
        assert report.compared_hashed_blocks["compressed"] > 50


def test_the_compressed_groups_blocks_are_freed(runs):
    *_, quarter = runs
    prefix = 700 // BLOCK
    after = [row["3"] for row in quarter.held_blocks if "3" in row][-8:]
    tail = {ceil(count / BLOCK) - prefix for count in range(700 + 40 - 9, 700 + 40)}
    assert set(after) == {ceil(prefix / 4) + blocks for blocks in tail}
    assert quarter.metrics["vllm_kvzip_blocks_freed_total"] > 30


def test_a_compressed_prefix_is_found_again(runs):
    _, whole, quarter = runs
    for report in (whole, quarter):
        assert report.cached_tokens[4] == report.cached_tokens[5] == 400 // BLOCK * BLOCK
        assert report.metrics["vllm_kvzip_prefix_hits_total"] >= 3


def test_preempted_requests_come_out_right(model):
    """A pool too small for the load; at keep ratio 1.0 every token must equal stock vLLM's."""
    rng = np.random.default_rng(7)
    requests = [Request(tokens(rng, 190 + 5 * n), 120) for n in range(10)]
    engine = {**OFF, "model": model, "max_model_len": 512}
    small = {"num_gpu_blocks_override": 72, "max_num_batched_tokens": 512}
    asked = {"min_prompt_tokens": 0, "scorer": "random"}
    stock = run_job(requests, **engine)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0, **asked}, **engine, **small)
    assert whole.num_preemptions > 0
    assert whole.outputs == stock.outputs
    assert whole.free_blocks[-1] == whole.free_blocks[0]
    half = run_job(requests, kvzip={"keep_ratio": 0.5, **asked}, **engine, **small)
    assert half.free_blocks[-1] == half.free_blocks[0]
    assert half.metrics["vllm_kvzip_requests_compressed_total"] >= len(requests)
