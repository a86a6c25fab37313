"""Write the table of models whose layers differ into ``docs/limits.md``.

    python scripts/document_families.py

What is compressed, and how much of a request that is, follows from a model's configuration, as in
``vllm-kvzip doctor``. The shapes below are those of published models, as far as their KV cache
depends on them. Blocks have 32 tokens, as on the CPU by default; larger ones, where vLLM fits
states of fixed size into them.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_kvzip.model.cache_shares import compressed_share, in_percent
from vllm_kvzip.vllm_bridge.fingerprint import compressed_layers
from vllm_kvzip.vllm_bridge.start.cache_plan import CachePlan, plan_cache
from vllm_kvzip.vllm_bridge.start.doctor import SHARE_LENGTHS

DOCUMENT = Path(__file__).parent.parent / "docs" / "limits.md"
BEGIN, END = "| model | compressed | left to vLLM |", "\n\n"
BLOCK_SIZE = 32
FULL, SLIDING, LINEAR, CONV = (
    "full_attention", "sliding_attention", "linear_attention", "conv",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A published model, as far as its KV cache depends on it.

    Attributes:
        model: its name.
        architecture, model_type: of its configuration.
        layers: kinds in order.
        others: what the layers are that are left alone; ``{window}`` stands for their tokens.
        heads: query heads, KV heads, and their size.
        tokens: of its longest context.
        more: further fields of its configuration.
    """

    model: str
    architecture: str
    model_type: str
    layers: list[str]
    others: str
    heads: tuple[int, int, int]
    tokens: int
    more: dict[str, Any] = field(default_factory=dict)

    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        return {
            "architectures": [self.architecture], "model_type": self.model_type,
            "num_hidden_layers": len(self.layers), "layer_types": self.layers, "vocab_size": 262144,
            "num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1],
            "head_dim": self.heads[2], "hidden_size": self.heads[0] * self.heads[2],
            "max_position_embeddings": self.tokens, **self.more,
        }  # fmt: skip


def _every(period: int, layers: int, other: str, at: int | None = None) -> list[str]:
    """Every ``period``-th layer has full attention: the last one of each, or that at ``at``."""
    place = period - 1 if at is None else at
    return [FULL if index % period == place else other for index in range(layers)]


WINDOW = "{window:,} tokens of window"
SHAPES = (
    Shape(
        "Gemma 2 27B", "Gemma2ForCausalLM", "gemma2", _every(2, 46, SLIDING), WINDOW,
        (32, 16, 128), 8192, {"sliding_window": 4096},
    ),
    Shape(
        "Gemma 3 27B", "Gemma3ForCausalLM", "gemma3_text", _every(6, 62, SLIDING), WINDOW,
        (32, 16, 128), 131072, {"sliding_window": 1024},
    ),
    Shape(
        "OLMo 3 32B", "Olmo3ForCausalLM", "olmo3", _every(4, 64, SLIDING), WINDOW,
        (40, 8, 128), 65536, {"sliding_window": 4096},
    ),
    Shape(
        "Command A (Cohere2)", "Cohere2ForCausalLM", "cohere2", _every(4, 64, SLIDING), WINDOW,
        (96, 8, 128), 131072, {"sliding_window": 4096},
    ),
    Shape(
        "EXAONE 4 32B", "Exaone4ForCausalLM", "exaone4", _every(4, 64, SLIDING), WINDOW,
        (40, 8, 128), 131072, {"sliding_window": 4096},
    ),
    Shape(
        "gpt-oss-120b", "GptOssForCausalLM", "gpt_oss", _every(2, 36, SLIDING), WINDOW,
        (64, 8, 64), 131072, {"sliding_window": 128},
    ),
    Shape(
        "LFM2 1.2B", "Lfm2ForCausalLM", "lfm2",
        [FULL if index in (2, 5, 8, 10, 12, 14) else CONV for index in range(16)],
        "short convolutions", (32, 8, 64), 128000, {"conv_L_cache": 3, "conv_dim": 2048},
    ),
    Shape(
        "Qwen3-Next 80B", "Qwen3NextForCausalLM", "qwen3_next", _every(4, 48, LINEAR),
        "linear attention", (16, 2, 256), 262144,
        {
            "linear_num_value_heads": 32, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
            "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "hidden_size": 2048,
        },
    ),
    Shape(
        "Granite 4.0 H Small", "GraniteMoeHybridForCausalLM", "granitemoehybrid",
        [{FULL: "attention", LINEAR: "mamba"}[kind] for kind in _every(10, 40, LINEAR, at=5)],
        "Mamba 2", (32, 8, 128), 131072,
        {
            "mamba_n_heads": 128, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1,
            "mamba_expand": 2, "mamba_d_conv": 4,
        },
    ),
)  # fmt: skip


def plan_of(shape: Shape) -> CachePlan:
    """The KV cache that vLLM makes for a model of this shape, in bfloat16 on one rank."""
    from vllm_kvzip.vllm_bridge.symbols import EngineArgs

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(shape.config()))
        arguments = EngineArgs(
            folder, skip_tokenizer_init=True, dtype="bfloat16", block_size=BLOCK_SIZE
        )
        return plan_cache(arguments.create_engine_config())


def family_row(shape: Shape) -> str:
    """A row of the table."""
    plan, total = plan_of(shape), len(shape.layers)
    layers = len(compressed_layers(plan.vllm_config) or ())
    shares = [
        in_percent(compressed_share(layers, plan.others, tokens, plan.block_size))
        for tokens in (min(tokens, shape.tokens) for tokens in SHARE_LENGTHS)
    ]
    for index, tokens in enumerate(SHARE_LENGTHS):
        if round(tokens / 1024) > round(shape.tokens / 1000):  # 128,000 tokens are 128k, too
            shares[index] = ""
    others = f"{total - layers}: {shape.others.format(window=shape.more.get('sliding_window', 0))}"
    cells = [shape.model, f"{layers} of {total} layers", others, *shares, f"{plan.block_size:,}"]
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def families_table() -> str:
    """The table in Markdown, a row a model."""
    lengths = [f"{tokens // 1024}k" for tokens in SHARE_LENGTHS]
    head = f"{BEGIN} {' | '.join(lengths)} | tokens a block |"
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *map(family_row, SHAPES)])


def with_families(document: str) -> str:
    """A document with its table of families as it should be."""
    before, rest = document.split(BEGIN, 1)
    return before + families_table() + END + rest.split(END, 1)[1]


if __name__ == "__main__":
    DOCUMENT.write_text(with_families(DOCUMENT.read_text()))
