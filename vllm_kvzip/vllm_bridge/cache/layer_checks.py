"""Layers that cannot be compressed, said in one sentence once vLLM has built them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.symbols import FullAttentionSpec, MambaSpec, SlidingWindowSpec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_kvzip.config import Mode
    from vllm_kvzip.vllm_bridge.symbols import KVCacheSpec, VllmConfig

ATTENDS_OVER_HEAD_PAGES = "attends_over_head_pages"
"""Attribute of our attention implementations."""


def check_layers(
    specs: Mapping[str, KVCacheSpec], layers: Mapping[str, Any], vllm_config: VllmConfig
) -> None:
    """Refuse layers that the checks of the configuration did not see, once the model is loaded.

    Args:
        specs: vLLM's, by layer name; a window that slides nowhere is full attention by now. Layers
            with a window that slides are left to vLLM.
        layers: vLLM's attention layers, by name.
        vllm_config: of the engine.

    Raises:
        UnsupportedError: names the layer, its kind, and what to do.
    """
    shapes = set()
    problems: list[tuple[str, bool, str]] = []
    for name, layer in layers.items():  # one that shares a cache has no spec
        shared = getattr(layer, "kv_sharing_target_layer_name", None)
        problems.append((name, bool(shared), f"the KV cache of layer {shared}"))
    for name, spec in specs.items():
        if is_left_alone(spec):
            continue
        layer = layers.get(name)
        is_full = type(spec) is FullAttentionSpec and not (
            spec.sliding_window or spec.attention_chunk_size or spec.non_causal
        )
        is_ours = getattr(getattr(layer, "impl", None), ATTENDS_OVER_HEAD_PAGES, False)
        problems += [
            (name, not is_full, f"{type(spec).__name__}, which is no full attention"),
            (name, not is_ours, f"an attention of its own, {type(layer).__name__}"),
        ]
        if is_full and is_ours:
            keys, values = spec.head_size, spec.head_size_v
            shapes.add((spec.num_kv_heads, keys, spec.dtype, getattr(layer, "num_heads", None)))
            problems += [
                (name, keys != values, f"value heads of {values} beside key heads of {keys}"),
                (name, len(shapes) > 1, "other heads than the layers before it"),
            ]
    for name, present, what in problems:
        if present:
            raise UnsupportedError(
                f"KV compression does not support layer {name}: it has {what}; run "
                f"{vllm_config.model_config.architecture} without --kv-compression."
            )


def is_left_alone(spec: KVCacheSpec) -> bool:
    """Whether a layer goes on as it is beside compressed layers."""
    return type(spec) in (SlidingWindowSpec, MambaSpec)


def check_attention(impl: Any, is_capped: bool = False) -> None:
    """Refuse what an attention layer adds to its logits, when it is built.

    Args:
        impl: vLLM's attention implementation.
        is_capped: whether it caps its logits, where our kernels do not.

    Raises:
        UnsupportedError: names the property, and what to do.
    """
    problems = [
        (impl.alibi_slopes is not None, "ALiBi"),
        (impl.sinks is not None, "learned attention sinks"),
        (is_capped, "capped attention logits on GPUs"),
    ]
    for what in (text for present, text in problems if present):
        raise UnsupportedError(
            f"KV compression does not support {what}; run this model without --kv-compression."
        )


def check_capped_logits(is_capped: bool, mode: Mode, repeats_with: str | None) -> None:
    """Refuse what does not know how a model caps its attention logits.

    Args:
        is_capped: whether the model does.
        mode: of compression.
        repeats_with: the scorer, if it lets the model repeat its context.

    Raises:
        UnsupportedError: naming the setting.
    """
    if is_capped and mode != "evict":
        raise UnsupportedError(
            f"Mode {mode} does not work with capped attention logits yet; set mode to evict."
        )
    if is_capped and repeats_with is not None:
        raise UnsupportedError(
            f"Scorer {repeats_with} does not work with capped attention logits yet; choose "
            f"another scorer."
        )
