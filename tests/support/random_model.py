"""Models of kinds that nobody has trained small: random weights, so that outputs can be compared.

Greedy outputs of random weights repeat themselves soon. Initial weights are larger than usual, so
that what a model says depends on its whole context.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

SHAPE = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048,
    "initializer_range": 0.3, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


def quiet_embeddings(model: PreTrainedModel) -> None:
    """A model with tied embeddings would repeat its last token."""
    model.get_input_embeddings().weight.data.mul_(0.03)


def strong_sinks(model: PreTrainedModel) -> None:
    """Attention logits of these random weights are large, and so must be those of sinks."""
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data.copy_(torch.linspace(8, 18, len(weight)))


@dataclass(frozen=True)
class Kind:
    """One kind of model.

    Attributes:
        config_class: of transformers.
        fields: of its configuration, beside :data:`SHAPE`.
        engine: what vLLM needs to run it right on a CPU.
        change: what is done to the random weights.
    """

    config_class: type
    fields: dict[str, Any]
    engine: dict[str, Any] = field(default_factory=dict)
    change: Callable[[PreTrainedModel], None] | None = None


KINDS = {
    "gemma2": Kind(
        transformers.Gemma2Config,
        {
            "sliding_window": 96, "layer_types": [SLIDING, FULL] * 2, "query_pre_attn_scalar": 32,
            "attn_logit_softcapping": 3.0, "final_logit_softcapping": None,
            "tie_word_embeddings": True,
        },
        change=quiet_embeddings,
    ),
    "gemma3": Kind(
        transformers.Gemma3TextConfig,
        {"sliding_window": 96, "layer_types": [SLIDING] * 3 + [FULL], "query_pre_attn_scalar": 32},
    ),
    "gpt-oss": Kind(
        transformers.GptOssConfig,
        {
            "sliding_window": 96, "layer_types": [SLIDING, FULL] * 2, "num_local_experts": 4,
            "num_experts_per_tok": 2, "intermediate_size": 64,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0,
                "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096,
            },
        },
        change=strong_sinks,
    ),
    "olmo3": Kind(
        transformers.Olmo3Config, {"sliding_window": 80, "layer_types": [SLIDING, FULL] * 2}
    ),
    "cohere2": Kind(
        transformers.Cohere2Config, {"sliding_window": 64, "layer_types": [SLIDING, FULL] * 2}
    ),
    "exaone4": Kind(
        transformers.Exaone4Config, {"sliding_window": 64, "layer_types": [SLIDING] * 3 + [FULL]}
    ),
    "lfm2": Kind(
        transformers.Lfm2Config,
        {
            "layer_types": ["conv", FULL] * 2, "tie_word_embeddings": True, "hidden_size": 128,
            "block_auto_adjust_ff_dim": False, "conv_dim": 128, "block_dim": 128,
            "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0,
        },
        # vLLM's rms_norm for CPUs ignores the strides of a part of the queries, keys and values.
        {"compilation_config": {"custom_ops": ["none"]}},
    ),
    "qwen3-next": Kind(
        transformers.Qwen3NextConfig,
        {
            "layer_types": [LINEAR] * 3 + [FULL], "head_dim": 128, "linear_num_key_heads": 1,
            "linear_num_value_heads": 2, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
            "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.5,
        },
        {"dtype": "bfloat16"},  # the only one that vLLM's linear attention takes on CPUs
    ),
    "granite4-h": Kind(
        transformers.GraniteMoeHybridConfig,
        {
            "layer_types": ["mamba"] * 3 + ["attention"], "hidden_size": 128, "mamba_n_heads": 8,
            "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2,
            "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 128,
        },
        # Mamba 2 on CPUs does not save the states that vLLM's prefix cache asks it for.
        {"enable_prefix_caching": False},
    ),
    "nemotron-h": Kind(
        transformers.NemotronHConfig,
        {
            "layer_types": [LINEAR, "mlp", FULL, LINEAR, "mlp"], "hidden_size": 128,
            "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1,
        },
        {"enable_prefix_caching": False},
    ),
}  # fmt: skip


def make_random_model(kind: str, folder: Path) -> Path:
    """Write a model of one of :data:`KINDS`; returns its folder."""
    chosen = KINDS[kind]
    torch.manual_seed(0)
    fields = {**SHAPE, "num_hidden_layers": len(chosen.fields["layer_types"]), **chosen.fields}
    config = chosen.config_class(**fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if chosen.change is not None:
        chosen.change(model)
    path = folder / kind
    model.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    return path
