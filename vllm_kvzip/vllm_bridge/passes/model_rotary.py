"""Worker side: the rotary angles and the positions of the running model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.model.rotary import RotaryTables
from vllm_kvzip.model.transformers_rotary import transformers_tables
from vllm_kvzip.vllm_bridge.symbols import (
    Attention,
    Phi3LongRoPEScaledRotaryEmbedding,
    RotaryEmbeddingBase,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from vllm_kvzip.vllm_bridge.symbols import ModelConfig

ROTARY_MODULES = (RotaryEmbeddingBase, Phi3LongRoPEScaledRotaryEmbedding)


def find_rotary(
    model: nn.Module, layer_names: Sequence[str], text_config: Any
) -> list[RotaryTables | None]:
    """Angles of each attention layer; None for a layer without rotary embedding.

    vLLM's models keep an attention layer and its rotary embedding in the same module. Models of its
    Transformers backend have one of transformers' for all layers, and layers may do without.

    Args:
        model: as vLLM built it.
        layer_names: vLLM's layer names in layer order.
        text_config: of the model, in transformers' format.

    Raises:
        UnsupportedError: if the model has rotary embeddings but one layer's is not found.
    """
    found: dict[str, nn.Module] = {}
    without: set[str] = set()
    has_rotary = bool(getattr(text_config, "rope_parameters", None))
    for module in model.modules():
        children = list(module.children())
        rotary = [child for child in children if isinstance(child, ROTARY_MODULES)]
        has_rotary = has_rotary or bool(rotary)
        for child in children:
            if isinstance(child, Attention) and len(rotary) == 1:
                found[child.layer_name] = rotary[0]
            elif isinstance(child, Attention) and not getattr(module, "use_rope", True):
                without.add(child.layer_name)
    tables: dict[int, RotaryTables] = {}
    for rotary_layer in found.values():
        if id(rotary_layer) not in tables:
            tables[id(rotary_layer)] = tables_of(rotary_layer)
    missing = [name for name in layer_names if name not in found and name not in without]
    if not has_rotary or not missing:
        return [tables[id(found[name])] if name in found else None for name in layer_names]
    shared = None if found else _of_all_layers(model, text_config)
    if shared is None:
        raise UnsupportedError(
            f"This scorer needs the rotary embedding of layer {missing[0]}, which was not found; "
            f"choose another scorer."
        )
    return [None if name in without else shared for name in layer_names]


def _of_all_layers(model: nn.Module, text_config: Any) -> RotaryTables | None:
    """Angles of the one rotary embedding of a model that runs by transformers' code."""
    embeddings = [
        module
        for module in model.modules()
        if hasattr(module, "inv_freq") and hasattr(module, "attention_scaling")
    ]
    positions = getattr(text_config, "max_position_embeddings", None)
    if len(embeddings) != 1 or positions is None:
        return None
    return transformers_tables(embeddings[0], positions)


def tables_of(rotary: Any) -> RotaryTables:
    """Angles of one of vLLM's rotary embeddings, at every position that it has."""
    cos, sin = _rows_of(rotary).float().chunk(2, dim=-1)
    interleaved = not getattr(rotary, "is_neox_style", True)  # LongRoPE knows one style only
    return RotaryTables(cos, sin, interleaved)


def num_positions(model: nn.Module, model_config: ModelConfig) -> int:
    """Positions the model can be run at, which may be many more than an engine gives a request.

    Args:
        model: as vLLM built it; its rotary embeddings hold a row a position.
        model_config: asked where there are no such rows.
    """
    rotary = [module for module in model.modules() if isinstance(module, ROTARY_MODULES)]
    counts = [len(rows) for module in rotary if (rows := _rows_of(module)) is not None]
    if counts:
        return min(counts)
    named = getattr(model_config.hf_text_config, "max_position_embeddings", None)
    return max(model_config.max_model_len, named or 0)


def _rows_of(rotary: Any) -> Any:
    """Cosines and sines of each position, ``[positions, R]``; None where it holds none."""
    if isinstance(rotary, Phi3LongRoPEScaledRotaryEmbedding):  # two sets of rows in one
        short = rotary.original_max_position_embeddings
        rows = rotary.long_short_cos_sin_cache
        return rows[short:] if rotary.use_long_rope else rows[:short]
    return getattr(rotary, "cos_sin_cache", None)
