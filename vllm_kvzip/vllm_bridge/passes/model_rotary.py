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
ROTATES_ALL = ("v1", "apply_rope_all_layers", "force_rope")
"""Attributes of attention in vLLM's models of Cohere, of EXAONE 4, and of Cohere's mixture of
experts, which rotate in sliding windows only unless this is true. All layers have the embedding."""
ROTATE_IN_WINDOWS = ("cohere2", "cohere2_moe", "exaone4", "exaone_moe")
"""Kinds of models in transformers that do so, and say nothing of it."""


def find_rotary(
    model: nn.Module, layer_names: Sequence[str], text_config: Any
) -> list[RotaryTables | None]:
    """Angles of each attention layer; None for a layer without rotary embedding.

    vLLM's models keep an attention layer and its rotary embedding in the same module, and some have
    one that a layer does not use. Models of its Transformers backend have one of transformers' for
    all layers, with angles for each type of layer where these differ, and layers may do without.

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
            if isinstance(child, Attention) and not _rotates(module):
                without.add(child.layer_name)
            elif isinstance(child, Attention) and len(rotary) == 1:
                found[child.layer_name] = rotary[0]
    tables: dict[int, RotaryTables] = {}
    for rotary_layer in found.values():
        if id(rotary_layer) not in tables:
            tables[id(rotary_layer)] = tables_of(rotary_layer)
    missing = [name for name in layer_names if name not in found and name not in without]
    if not has_rotary or not missing:
        return [tables[id(found[name])] if name in found else None for name in layer_names]
    shared: dict[str, RotaryTables | None] = {}
    for name in missing:
        layer_type = _type_of(name, text_config)
        if layer_type not in shared:
            of_type = None if found else _of_all_layers(model, text_config, layer_type)
            shared[layer_type] = of_type
        if shared[layer_type] is None:
            raise UnsupportedError(
                f"This scorer needs the rotary embedding of layer {name}, which was not found; "
                f"choose another scorer."
            )
    return [
        None if name in without else shared[_type_of(name, text_config)] for name in layer_names
    ]


def _rotates(module: nn.Module) -> bool:
    """Whether a module of one attention layer rotates its keys, if it has a rotary embedding."""
    if not getattr(module, "use_rope", True) or getattr(module, "rotary_emb", module) is None:
        return False
    in_windows_only = any(getattr(module, name, True) is False for name in ROTATES_ALL)
    return not in_windows_only or bool(getattr(module, "sliding_window", None))


def _type_of(layer_name: str, text_config: Any) -> str:
    """The type of a layer in transformers' words, by the number in vLLM's name of it."""
    types = getattr(text_config, "layer_types", None)
    number = next((int(part) for part in layer_name.split(".") if part.isdigit()), None)
    if not types or number is None or number >= len(types):
        return "full_attention"
    return str(types[number])


def _of_all_layers(model: nn.Module, text_config: Any, layer_type: str) -> RotaryTables | None:
    """Angles of the one rotary embedding of a model that runs by transformers' code.

    Args:
        model: as vLLM built it.
        text_config: of the model.
        layer_type: of the layers that are asked for.
    """
    embeddings = [
        module
        for module in model.modules()
        if any(
            hasattr(module, f"{prefix}inv_freq") and hasattr(module, f"{prefix}attention_scaling")
            for prefix in ("", f"{layer_type}_")
        )
    ]
    positions = getattr(text_config, "max_position_embeddings", None)
    if len(embeddings) != 1 or positions is None:
        return None
    if getattr(text_config, "model_type", None) in ROTATE_IN_WINDOWS:
        return None
    return transformers_tables(embeddings[0], positions, layer_type)


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
