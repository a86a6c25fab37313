"""Shapes of models to time with random weights, which take as long as trained ones.

A shape becomes a folder with a ``config.json`` and nothing else. Cutting layers keeps the
proportions of attention and weights within a layer, and lets a CPU run the shape of a large model;
the vocabulary then weighs more than in the whole model.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

FIRST_TOKEN, LAST_TOKEN = 7, 500  # random prompts are made of these; vocabularies have them
BYTES_OF_DTYPE = {"float32": 4, "bfloat16": 2, "float16": 2}


def _llama(
    hidden: int, intermediate: int, layers: int, heads: tuple[int, int], size: int, words: int
) -> dict[str, Any]:
    """A Llama's configuration; ``heads`` are query heads and KV heads, ``size`` is theirs."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": words,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": size,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


# What "attention" and "step" are made for is said in SHAPE_NOTES; the others are those of models.
SHAPES: dict[str, dict[str, Any]] = {
    "attention": _llama(256, 512, 2, (4, 4), 256, 1024),
    "step": _llama(128, 256, 2, (2, 2), 64, 32768),
    "llama-3.2-1b": _llama(2048, 8192, 16, (32, 8), 64, 128256),
    "llama-3.1-8b": _llama(4096, 14336, 32, (32, 8), 128, 128256),
    "mistral-7b": _llama(4096, 14336, 32, (32, 8), 128, 32768),
    "qwen3-8b": _llama(4096, 12288, 36, (32, 8), 128, 151936),
}
SHAPE_NOTES = {
    "attention": "made for this benchmark: few weights, a KV head of size 256 per query head, so "
    "that attention takes most of a step",
    "step": "made for this benchmark: little attention under a large vocabulary, so that a decode "
    "step costs about the same however many requests share it, as on a GPU",
}


def write_shape(folder: Path, config: dict[str, Any], layers: int | None, tokens: int) -> str:
    """Write the ``config.json`` of a model without weights.

    Args:
        folder: takes the file.
        config: a model's configuration.
        layers: keep only so many layers; None keeps all.
        tokens: positions the model must have; a shorter one is stretched.

    Returns:
        the shape in words, for the report.

    Raises:
        ValueError: if the model has fewer layers.
    """
    config = dict(config)
    available = config["num_hidden_layers"]
    if layers is not None:
        if not 1 <= layers <= available:
            raise ValueError(f"--layers {layers}: the model has {available}")
        config["num_hidden_layers"] = layers
        if "layer_types" in config:
            config["layer_types"] = config["layer_types"][:layers]
    config["max_position_embeddings"] = max(config.get("max_position_embeddings", 0), tokens)
    (folder / "config.json").write_text(json.dumps(config))
    return in_words(config, available)


def in_words(config: dict[str, Any], available_layers: int | None = None) -> str:
    """Layers, heads and sizes of a configuration, in one line.

    Args:
        config: a model's configuration.
        available_layers: of the whole model, when some were cut.
    """
    queries = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // queries
    layers = str(config["num_hidden_layers"])
    if available_layers not in (None, config["num_hidden_layers"]):
        layers += f" of {available_layers}"
    return (
        f"{layers} layers, {queries} query heads and "
        f"{config.get('num_key_value_heads', queries)} KV heads of size {size}, "
        f"hidden size {config['hidden_size']}, vocabulary {config['vocab_size']}"
    )
