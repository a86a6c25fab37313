"""Layers that cannot be compressed, said in one sentence once vLLM has built them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.symbols import FullAttentionSpec, MambaSpec, SlidingWindowSpec

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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


def check_draft_layers(specs: Mapping[str, KVCacheSpec], drafts: Collection[str]) -> None:
    """Refuse layers of a draft model that cannot keep their KV pairs in the target's blocks.

    Args:
        specs: by layer name, in the order of vLLM's KV cache group; of layers that passed
            :func:`check_layers`.
        drafts: names of the draft model's layers.

    Raises:
        UnsupportedError: naming the setting.
    """
    if not drafts:
        return
    names = [name for name, spec in specs.items() if not is_left_alone(spec)]
    if len(names) < len(specs) or set(names[len(names) - len(drafts) :]) != set(drafts):
        raise UnsupportedError(
            "KV compression does not support a draft model beside layers with a sliding window or "
            "a state; remove --speculative-config, or use method ngram."
        )


def is_left_alone(spec: KVCacheSpec) -> bool:
    """Whether a layer goes on as it is beside compressed layers."""
    return type(spec) in (SlidingWindowSpec, MambaSpec)


def check_attention(impl: Any) -> None:
    """Refuse what an attention layer adds to its logits, when it is built.

    Args:
        impl: vLLM's attention implementation.

    Raises:
        UnsupportedError: names the property, and what to do.
    """
    if impl.alibi_slopes is not None:
        raise UnsupportedError(
            "KV compression does not support ALiBi; run this model without --kv-compression."
        )


def check_capped_logits(is_capped: bool, scorer: str) -> None:
    """Refuse a scorer that does not know how a model caps its attention logits.

    Args:
        is_capped: whether the model does.
        scorer: its name.

    Raises:
        UnsupportedError: naming the setting.
    """
    from vllm_kvzip.scoring import scorer_class

    if is_capped and not scorer_class(scorer).takes_capped_logits:
        raise UnsupportedError(
            f"Scorer {scorer} does not work with capped attention logits yet; choose contrast or "
            f"window."
        )


def check_sinks(has_sinks: bool, attention_kernel: str) -> None:
    """Refuse vLLM's kernel over head pages for learned logits of query heads.

    It takes them by query head, the same for all sequences, and each KV head is a sequence there.

    Args:
        has_sinks: whether the model has learned attention sinks.
        attention_kernel: of the configuration.

    Raises:
        UnsupportedError: naming the setting.
    """
    if has_sinks and attention_kernel == "vllm":
        raise UnsupportedError(
            "attention_kernel vllm does not work with learned attention sinks yet; set it to auto "
            "or triton."
        )
