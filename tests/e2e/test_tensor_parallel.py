"""Two ranks, each with half of the KV heads, keep what one process keeps."""

import json
import shutil

import numpy as np
import pytest
from copy_load import copy_requests
from engine_job import MODEL, Request, run_job
from safetensors.torch import load_file, save_file

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context, question_prompt
from vllm_kvzip.head_profiles.head_profile import profile_folders

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TWO = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_keep_one_equals_stock():
    stock = run_job(copy_requests())
    two = run_job(copy_requests(), kvzip={"keep_ratio": 1.0}, **TWO)
    assert two.outputs == stock.outputs
    assert two.free_blocks[-1] == two.free_blocks[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"scorer": "keydiff", "budget": "uniform"},  # rank by rank what one process keeps
        {},  # the profile: two of the four heads to keep whole are on each rank
    ],
)
def test_fixed_budgets_keep_what_one_process_keeps(settings):
    settings = {"keep_ratio": 0.4, **settings}
    one = run_job(copy_requests(), kvzip=settings)
    two = run_job(copy_requests(), kvzip=settings, **TWO)
    assert two.outputs == one.outputs
    assert two.held_blocks == one.held_blocks
    for name, value in one.metrics.items():
        if "seconds_sum" not in name:
            assert two.metrics[name] == value, name


def test_ranks_repeat_the_context_together():
    """Scorer kvzip: the model's collectives run in the scoring passes too."""
    context = make_context(np.random.default_rng(3), 1024, fact_density=0.3)
    keys = list(context.facts)[::4]
    declared = {"extra_args": {"kvzip_context_tokens": 1024}}
    requests = [Request(context.tokens.tolist(), 2, options=declared)]
    asked = [question_prompt(context, key) for key in keys]
    requests += [Request(prompt, 1, arrives=6, options=declared) for prompt, _ in asked]
    report = run_job(requests, kvzip={"keep_ratio": 0.25, "scorer": "kvzip"}, **TWO)
    answers = [output[0] for output in report.outputs[1:]]
    assert np.mean([a == value for a, (_, value) in zip(answers, asked, strict=True)]) >= 0.95
    assert report.metrics["vllm_kvzip_prefix_hits_total"] == len(asked)
    assert report.metrics["vllm_kvzip_compress_seconds_count/score"] == 1


def one_kv_head(folder, **changed):
    """The test model's first KV head alone, and settings with a profile of that model."""
    shutil.copytree(MODEL, folder)
    config = json.loads((MODEL / "config.json").read_text()) | {"num_key_value_heads": 1, **changed}
    (folder / "config.json").write_text(json.dumps(config))
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if "k_proj" in name or "v_proj" in name:
            tensors[name] = tensor[: config["head_dim"]].contiguous()
    save_file(tensors, weights, {"format": "pt"})
    profile = json.loads((profile_folders()[-1] / "tiny-retriever.json").read_text())
    profile["model"] |= {"num_kv_heads": 1, "architecture": config["architectures"][0]}
    profile["importance"] = [[0.1], [0.2], [0.9], [0.1]]
    profile["budgets"] = {"0.4": [[0.2], [0.3], [1.0], [0.1]]}
    profile["tiers"] = None
    path = folder / "profile.json"
    path.write_text(json.dumps(profile))
    return {"profile": str(path), "budget": "profile", "scorer": "keydiff", "keep_ratio": 0.4}


def test_ranks_that_repeat_a_kv_head_keep_what_one_process_keeps(tmp_path):
    """More ranks than KV heads; one process has the same weights behind a window besides.

    The window holds the longest request, so that it slides nowhere.
    """
    window = {"model_type": "mistral", "sliding_window": 2048}
    window["architectures"] = ["MistralForCausalLM"]
    behind, plain = tmp_path / "window", tmp_path / "plain"
    one = run_job(copy_requests(), kvzip=one_kv_head(behind, **window), model=behind)
    two = run_job(copy_requests(), kvzip=one_kv_head(plain), model=plain, **TWO)
    assert two.outputs == one.outputs
    assert two.held_blocks == one.held_blocks
    assert one.metrics["vllm_kvzip_requests_compressed_total"] == 3
    assert one.classes["spec"] == "HeadPageSpec"
