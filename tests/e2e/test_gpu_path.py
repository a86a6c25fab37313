"""The GPU's path inside real vLLM, interpreted on the CPU; see ``tests/support/gpu_path.py``.

Decode, chunked prefill, a prompt below the threshold, and a question of several tokens over a
cached compressed prefix, by our kernel and by vLLM's over (request, KV head) pairs. vLLM's own
Triton attention takes seconds a step here, so prompts are few and short.
"""

import numpy as np
import pytest
from engine_job import MODEL, RUNNER_V2, Request, run_job
from random_model import KINDS, make_random_model

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SETTINGS = {"min_prompt_tokens": 32, "scorer": "keydiff"}
ENGINE = {"max_num_batched_tokens": 96, "max_num_seqs": 8, "max_model_len": 512}
HEAD = MODEL.with_name("tiny-eagle")
EAGLE = {"speculative_config": {"method": "eagle", "model": str(HEAD), "num_speculative_tokens": 2}}


def requests(longest=96):
    rng = np.random.default_rng(7)
    prompts = [make_context(rng, length).tokens.tolist() for length in (70, longest, 20)]
    question = prompts[1] + make_context(rng, 21).tokens.tolist()
    return [*(Request(prompt, 5) for prompt in prompts), Request(question, 4, arrives=6)]


def on_the_gpus_path(kernel, asked=None, engine=None, **settings):
    kvzip = {**SETTINGS, **settings, "attention_kernel": kernel}
    engine = {**ENGINE, **(engine or {})}
    return run_job(asked or requests(), kvzip, RUNNER_V2, gpu_path=True, **engine)


def on_the_cpus_path(asked=None, engine=None, **settings):
    engine = {**ENGINE, **(engine or {})}
    return run_job(asked or requests(), {**SETTINGS, **settings}, **engine)


@pytest.fixture(scope="module")
def stock():
    return run_job(requests(), None, **ENGINE)


def test_keep_ratio_one_is_token_identical_with_whichever_kernel_is_faster(stock):
    whole = on_the_gpus_path("auto", keep_ratio=1.0)
    assert whole.classes["backend"] == "HeadPageTritonBackend"
    assert whole.classes["batcher"] == "KernelBatcher"
    assert whole.classes["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert whole.outputs == stock.outputs
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] == 2
    assert whole.metrics["vllm_kvzip_prefix_hits_total"] == 1
    assert whole.free_blocks[-1] == whole.free_blocks[0]


@pytest.mark.parametrize(
    ("kernel", "scorer", "ratio", "engine"),
    [("vllm", "kvzip", 0.4, {}), ("triton", "window", 0.3, EAGLE)],
)
def test_what_is_kept_is_kept_and_read_as_on_the_cpu(stock, kernel, scorer, ratio, engine):
    """The second engine speculates; the layer of its head is among those that the kernel reads."""
    gpus = on_the_gpus_path(kernel, None, engine, keep_ratio=ratio, scorer=scorer)
    cpus = on_the_cpus_path(None, engine, keep_ratio=ratio, scorer=scorer)
    assert gpus.outputs == cpus.outputs
    assert gpus.outputs != stock.outputs or scorer == "window"
    assert gpus.held_blocks == cpus.held_blocks
    for name in ("requests_compressed_total", "blocks_freed_total", "prefix_hits_total"):
        no_hits = scorer == "window" and name.startswith(
            "prefix"
        )  # it shares declared contexts only
        found = gpus.metrics[f"vllm_kvzip_{name}"]
        assert found == cpus.metrics[f"vllm_kvzip_{name}"]
        assert no_hits == (found == 0)
    assert gpus.metrics["vllm_kvzip_attention_seconds_count/decode"] > 0
    assert gpus.free_blocks[-1] == gpus.free_blocks[0]


@pytest.fixture(scope="module")
def with_states(tmp_path_factory):
    """A model whose states make blocks large, and requests for it."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 500, length).tolist() for length in (190, 350, 20)]
    question = prompts[1] + rng.integers(3, 500, 21).tolist()
    asked = [*(Request(prompt, 4) for prompt in prompts), Request(question, 3, arrives=8)]
    engine = {
        "model": make_random_model("qwen3-next", tmp_path_factory.mktemp("models")),
        "max_num_batched_tokens": 128, "num_gpu_blocks_override": 60, "skip_tokenizer_init": True,
        **KINDS["qwen3-next"].engine,
    }  # fmt: skip
    return asked, engine


def test_pages_inside_the_large_blocks_of_a_model_with_states(with_states):
    """By vLLM's kernel, whose numbers of 16 bits are the same over head pages and over blocks."""
    raw, whole = (
        on_the_gpus_path("vllm", *with_states, keep_ratio=1.0, min_prompt_tokens=least)
        for least in (999, 32)
    )
    assert whole.pages_per_head == 10
    assert whole.outputs == raw.outputs
    assert raw.metrics["vllm_kvzip_requests_compressed_total"] == 0
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] == 2
    assert whole.metrics["vllm_kvzip_prefix_hits_total"] == 1
    for report in (raw, whole):
        assert report.free_blocks[-1] == report.free_blocks[0]


def test_runner_v1_reads_the_same_with_our_kernel():
    environment = {"TRITON_INTERPRET": "1"}
    kvzip = {**SETTINGS, "keep_ratio": 0.4}
    ours = run_job(requests(), kvzip, environment, triton_attention=True, **ENGINE)
    theirs = on_the_cpus_path(keep_ratio=0.4)
    assert ours.classes["batcher"] == "KernelBatcher"
    assert ours.outputs == theirs.outputs
    assert ours.held_blocks == theirs.held_blocks


def test_a_cache_of_eight_bits():
    """Scored, compacted and read by our kernel as vLLM's own reads it where nothing is evicted."""
    rng = np.random.default_rng(3)
    contexts = [make_context(rng, length).tokens.tolist() for length in (70, 40)]
    pair = [Request(context, 4, options={"logprobs": 0}) for context in contexts]
    engine = {**ENGINE, "kv_cache_dtype": "fp8", "gpu_path": True}
    jobs = [
        {**SETTINGS, "min_prompt_tokens": 999, "keep_ratio": 0.4},
        {**SETTINGS, "keep_ratio": 1.0},
        {**SETTINGS, "keep_ratio": 0.5, "scorer": "kvzip", "sink_tokens": 2, "recent_tokens": 8},
    ]
    raw, whole, half = (run_job(pair, job, RUNNER_V2, **engine) for job in jobs)
    assert raw.metrics["vllm_kvzip_requests_compressed_total"] == 0
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] == 2
    assert whole.classes["batcher"] == "KernelBatcher"
    assert whole.outputs == raw.outputs
    for mine, theirs in zip(whole.logprobs, raw.logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    assert half.metrics["vllm_kvzip_blocks_freed_total"] == 1
    for report in (raw, whole, half):
        assert report.free_blocks[-1] == report.free_blocks[0]


def test_two_tiers_are_as_on_the_cpus_path():
    """Quantized, rotated and attended to by our kernels; fewer bits leave the tokens alone here.

    Both engines speculate, and their head's layer keeps everything as it is.
    """
    settings = {"mode": "mixed", "keep_bytes_ratio": 0.5, "full_share": 0.5, "key_format": "int8"}
    asked = requests(128)
    mine = on_the_gpus_path("auto", asked, EAGLE, **settings)
    theirs = on_the_cpus_path(asked, EAGLE, **settings)
    assert mine.classes["batcher"] == "KernelBatcher"
    names = ("blocks_freed_total", "prefix_hits_total", "tokens_kept_total/full",
             "tokens_kept_total/quantized")  # fmt: skip
    for name in names:
        assert mine.metrics["vllm_kvzip_" + name] == theirs.metrics["vllm_kvzip_" + name] > 0
    assert mine.outputs == theirs.outputs == run_job(asked, None, **ENGINE).outputs
    assert mine.free_blocks[-1] == mine.free_blocks[0]
