"""Compression gives real blocks back: read from vLLM's own block pool, step by step."""

from math import ceil

import numpy as np
import pytest
from engine_job import MODEL, Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context
from vllm_kvzip.head_profiles.head_profile import (
    find_profile,
    load_profile,
    profile_folders,
    save_profile,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK = 32


def prompts(*lengths, seed=1):
    rng = np.random.default_rng(seed)
    return [make_context(rng, length).tokens.tolist() for length in lengths]


@pytest.fixture(scope="module")
def quarter():
    """One request after the other at keep ratio 0.25, then a batch with an abort in it."""
    single = [
        Request(prompt, 24, arrives=40 * number)
        for number, prompt in enumerate(prompts(1024, 1030, 1055, 1536))
    ]
    batch = [Request(prompt, 30, arrives=170) for prompt in prompts(1024, 1100, 700, 2000, seed=2)]
    batch[1].aborts = 180
    batch.append(Request(prompts(900, seed=3)[0], 1, arrives=170))
    batch.append(Request(prompts(900, seed=4)[0], 9, arrives=230, aborts=231))
    return [*single, *batch], run_job([*single, *batch], kvzip={"keep_ratio": 0.25})


@pytest.mark.versions
@pytest.mark.parametrize("number", range(4))
def test_seventy_percent_of_the_prompts_blocks_are_back_while_it_decodes(quarter, number):
    requests, report = quarter
    length, start = len(requests[number].prompt), requests[number].arrives
    prompt_blocks = ceil(length / BLOCK)
    total = report.free_blocks[0]
    decoding = report.free_blocks[start + 3 : start + 22]
    assert len(decoding) == 19
    for step, free in enumerate(decoding, start=3):
        output_blocks = ceil((length + step) / BLOCK) - prompt_blocks
        assert prompt_blocks - (total - free - output_blocks) >= 0.7 * prompt_blocks
    assert total - report.free_blocks[start + 1] >= prompt_blocks  # after the prefill's step


@pytest.mark.versions
def test_a_request_holds_exactly_what_the_formula_says(quarter):
    requests, report = quarter
    for number in range(4):
        length, start = len(requests[number].prompt), requests[number].arrives
        prefix = length // BLOCK
        for step in range(start + 2, start + 20):
            computed = length + (step - start)
            tail = ceil(computed / BLOCK) - prefix
            assert report.held_blocks[step][str(number)] == ceil(0.25 * prefix) + tail


@pytest.mark.versions
def test_the_pool_is_as_at_the_start_after_ends_and_aborts(quarter):
    _, report = quarter
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.held_blocks[-1] == {} or len(report.held_blocks[-1]) <= 1


@pytest.mark.versions
def test_counters_tell_what_happened(quarter):
    requests, report = quarter
    samples = report.metrics
    compressed = [r for r in requests if r.max_tokens > 1 and r.aborts != 231]
    assert samples["vllm_kvzip_requests_compressed_total"] == len(compressed)
    freed = sum(len(r.prompt) // BLOCK - ceil(0.25 * (len(r.prompt) // BLOCK)) for r in compressed)
    assert samples["vllm_kvzip_blocks_freed_total"] == freed
    assert samples["vllm_kvzip_tokens_evicted_total"] == freed * BLOCK
    assert samples["vllm_kvzip_kv_bytes_saved"] == 0  # nobody runs any more
    assert samples["vllm_kvzip_keep_ratio_count"] == len(compressed)
    assert samples["vllm_kvzip_requests_skipped_total/ended_before_decode"] == 2
    for stage in ("score", "select", "compact"):
        assert samples[f"vllm_kvzip_compress_seconds_count/{stage}"] >= len(compressed)


@pytest.fixture(scope="module")
def skewed_profile(tmp_path_factory):
    """One layer wants everything, all other heads nothing."""
    from vllm_kvzip.head_profiles.head_profile import ModelFingerprint

    running = ModelFingerprint(
        architecture="LlamaForCausalLM", num_layers=4, num_query_heads=8, num_kv_heads=4,
        head_dim=32, name=MODEL.name,
    )  # fmt: skip
    path = find_profile(running, profile_folders())
    assert path is not None
    profile = load_profile(path)
    grid = [[1.0 if layer == 1 else 0.0] * 4 for layer in range(4)]
    budgets = {"0.27": grid}
    target = tmp_path_factory.mktemp("profiles") / "skewed.json"
    save_profile(profile.model_copy(update={"budgets": budgets}), target)
    return target


def test_budgets_that_differ_by_layer_and_head_hold_the_least_number_of_blocks(skewed_profile):
    """Layer 1 keeps its 32 pages per head, every other head one: 140 pages in blocks of 16."""
    prompt = prompts(1024)[0]
    settings = {"keep_ratio": 0.27, "profile": str(skewed_profile), "recent_tokens": 16}
    report = run_job([Request(prompt, 16)], kvzip=settings)
    least = ceil((32 * 4 + 12) / 16)
    assert least == 9
    held = [row["0"] for row in report.held_blocks[2:14]]
    assert set(held) == {least + 1}  # and one dense block for the output
    assert report.free_blocks[-1] == report.free_blocks[0]


def test_preempted_requests_are_compressed_again_and_come_out_right():
    """A pool too small for the load; at keep ratio 1.0 every token must equal stock vLLM's."""
    lengths = [190, 200, 220, 230, 256, 210, 195, 225, 240, 199]
    requests = [Request(prompt, 220) for prompt in prompts(*lengths, seed=7)]
    small = {"num_gpu_blocks_override": 60, "max_model_len": 512}
    stock = run_job(requests)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0, "min_prompt_tokens": 0}, **small)
    assert whole.num_preemptions > 0
    assert whole.outputs == stock.outputs
    assert whole.free_blocks[-1] == whole.free_blocks[0]
    half = run_job(requests, kvzip={"keep_ratio": 0.5, "min_prompt_tokens": 0}, **small)
    assert half.num_preemptions > 0
    assert half.free_blocks[-1] == half.free_blocks[0]
    assert half.metrics["vllm_kvzip_requests_compressed_total"] >= len(requests)


def test_raw_prompt_blocks_stay_in_the_prefix_cache():
    """A second request with the same prompt hits the raw blocks of the compressed first one."""
    prompt = prompts(1000)[0]
    requests = [Request(prompt, 20), Request(prompt, 20, arrives=30)]
    requests.append(Request(prompt[:800] + prompts(100, seed=9)[0], 20, arrives=60))
    stock = run_job(requests, enable_prefix_caching=False)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0}, enable_prefix_caching=True)
    assert whole.outputs == stock.outputs
    assert whole.cached_tokens == [0, 31 * BLOCK, 25 * BLOCK]
    half = run_job(requests, kvzip={"keep_ratio": 0.3, "prefix_reuse": "raw"})
    assert half.outputs[0] == half.outputs[1]
    assert half.cached_tokens == whole.cached_tokens
