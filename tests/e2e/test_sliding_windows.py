"""Models of which some layers have a sliding window: full attention is compressed, they are not."""

import numpy as np
import pytest
from engine_job import Request, run_job
from mixed_load import check_freed, check_identity, check_pool, check_reuse, run_mixed, tokens
from random_model import make_random_model

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module", params=["gemma3", "olmo3", "gemma2", "gpt-oss"])
def runs(request, tmp_path_factory):
    return run_mixed(request.param, tmp_path_factory.mktemp("models"), repeats=True)


def test_keep_ratio_one_is_token_identical(runs):
    check_identity(runs)
    assert runs.whole.metrics["vllm_kvzip_compress_seconds_sum/score"] > 0.01  # it has repeated
    assert runs.whole.metrics.get("vllm_kvzip_requests_skipped_total/failed", 0) == 0


def test_every_block_of_every_group_is_back_and_none_of_the_cache_is_written(runs):
    check_pool(runs)


def test_the_compressed_groups_blocks_are_freed(runs):
    check_freed(runs)


def test_a_compressed_prefix_is_found_again(runs):
    check_reuse(runs)


def test_preempted_requests_come_out_right(tmp_path):
    """A pool too small for the load; at keep ratio 1.0 every token must equal stock vLLM's."""
    rng = np.random.default_rng(7)
    requests = [Request(tokens(rng, 190 + 5 * n), 200) for n in range(8)]
    model = make_random_model("gemma3", tmp_path)
    engine = {"skip_tokenizer_init": True, "model": model, "max_model_len": 512}
    small = {"num_gpu_blocks_override": 72, "max_num_batched_tokens": 128}
    asked = {"min_prompt_tokens": 0, "scorer": "random"}
    stock = run_job(requests, **engine)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0, **asked}, **engine, **small)
    assert whole.num_preemptions > 0
    assert whole.outputs == stock.outputs
    assert whole.free_blocks[-1] == whole.free_blocks[0]
    half = run_job(requests, kvzip={"keep_ratio": 0.5, **asked}, **engine, **small)
    assert half.free_blocks[-1] == half.free_blocks[0]
    assert half.metrics["vllm_kvzip_requests_compressed_total"] >= len(requests)
