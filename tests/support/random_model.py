"""Models of kinds that nobody has trained small: random weights, so that outputs can be compared.

Greedy outputs of random weights repeat themselves soon. Initial weights are larger than usual, so
that what a model says depends on its whole context.
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
    "initializer_range": 0.3, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
KINDS = {
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"sliding_window": 96, "layer_types": [SLIDING] * 3 + [FULL], "query_pre_attn_scalar": 32},
    ),
    "olmo3": (
        transformers.Olmo3Config, {"sliding_window": 80, "layer_types": [SLIDING, FULL] * 2},
    ),
    "cohere2": (
        transformers.Cohere2Config, {"sliding_window": 64, "layer_types": [SLIDING, FULL] * 2},
    ),
    "exaone4": (
        transformers.Exaone4Config, {"sliding_window": 64, "layer_types": [SLIDING] * 3 + [FULL]},
    ),
    "lfm2": (
        transformers.Lfm2Config,
        {
            "layer_types": ["conv", FULL] * 2, "tie_word_embeddings": True, "hidden_size": 128, "block_auto_adjust_ff_dim": False,
            "conv_dim": 128, "block_dim": 128, "block_multiple_of": 32,
            "block_ffn_dim_multiplier": 1.0,
        },
    ),
    "qwen3-next": (
        transformers.Qwen3NextConfig,
        {
            "layer_types": [LINEAR] * 3 + [FULL], "head_dim": 128, "linear_num_key_heads": 1,
            "linear_num_value_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.5,
        },
    ),
    "granite4-h": (
        transformers.GraniteMoeHybridConfig,
        {
            "layer_types": ["mamba"] * 3 + ["attention"], "hidden_size": 128, "mamba_n_heads": 8, "mamba_d_head": 32,
            "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2, "num_local_experts": 0,
            "num_experts_per_tok": 0, "shared_intermediate_size": 128,
        },
    ),
}  # fmt: skip


def make_random_model(kind: str, folder: Path) -> Path:
    """Write a model of one of :data:`KINDS`; returns its folder."""
    config_class, own = KINDS[kind]
    torch.manual_seed(0)
    fields = {**SHAPE, "num_hidden_layers": len(own["layer_types"]), **own}
    model = AutoModelForCausalLM.from_config(config_class(**fields), dtype=torch.float32)
    path = folder / kind
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return path
