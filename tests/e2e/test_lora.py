"""LoRA adapters with compression: each has prefixes of its own, raw and compressed."""

import json

import numpy as np
import pytest
import torch
from engine_job import MODEL, Request, run_job
from safetensors.torch import save_file

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONTEXT, BLOCK, RANK = 600, 32, 4
PREFIX = CONTEXT // BLOCK * BLOCK
ENGINE = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "num_gpu_blocks_override": 1024}


def write_adapter(folder, seed):
    """A random adapter that changes queries, keys and values of every layer."""
    config = json.loads((MODEL / "config.json").read_text())
    random = torch.Generator().manual_seed(seed)
    hidden, head_dim = config["hidden_size"], config["head_dim"]
    widths = {"q_proj": config["num_attention_heads"] * head_dim}
    widths |= dict.fromkeys(("k_proj", "v_proj"), config["num_key_value_heads"] * head_dim)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, width in widths.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_"
            tensors[stem + "A.weight"] = torch.randn(RANK, hidden, generator=random) * 0.1
            tensors[stem + "B.weight"] = torch.randn(width, RANK, generator=random) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    described = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 2 * RANK,
        "target_modules": list(widths), "bias": "none", "base_model_name_or_path": str(MODEL),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(described))
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three rounds over one context; in each the base model, then two adapters at once.

    vLLM's CPU build computes nonsense for the base model in a batch that has an adapter in it too.
    """
    folder = tmp_path_factory.mktemp("adapters")
    adapters = [None, *(write_adapter(folder / name, seed) for seed, name in enumerate("ab"))]
    rng = np.random.default_rng(1)
    context = make_context(rng, CONTEXT).tokens.tolist()
    requests = []
    for round_ in range(3):
        question = make_context(rng, 20 + 30 * round_).tokens.tolist()
        for lora in adapters:
            arrives = 80 * round_ + (40 if lora else 0)
            options = {"extra_args": {"kvzip_context_tokens": CONTEXT}}
            requests.append(Request(context + question, 30, arrives, None, options, lora=lora))
    stock = run_job(requests, enable_prefix_caching=False, **ENGINE)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0}, watch_hashed_blocks=True, **ENGINE)
    return stock, whole


def test_adapters_at_keep_ratio_one_equal_stock(runs):
    stock, whole = runs
    assert whole.outputs == stock.outputs
    for base, a, b in zip(*[iter(stock.outputs)] * 3, strict=True):
        assert base != a != b != base  # the adapters do something


def test_no_prefix_is_shared_across_adapters(runs):
    _, whole = runs
    assert whole.cached_tokens == [0] * 3 + [PREFIX] * 6
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] == 3
    assert whole.metrics["vllm_kvzip_prefix_hits_total"] == 6
    assert whole.prefix_entries[-1] == 3
    assert whole.written_hashed_blocks == []
    assert whole.free_blocks[-1] == whole.free_blocks[0]
