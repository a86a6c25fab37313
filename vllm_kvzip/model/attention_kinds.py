"""What a model's configuration says of its attention layers.

Configurations are read by the names that transformers gives their fields, so that the engine and
the scripts agree on which models can be compressed.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

SINK_FIELDS = (
    "attention_sinks",
    "add_full_attention_sink_bias",
    "add_swa_attention_sink_bias",
)
VARIED = "layers of different KV heads or head sizes"
FULL_KINDS = ("full_attention", "attention")
SLIDING_KIND = "sliding_attention"
STATE_KINDS = ("linear_attention", "mamba", "conv")
"""Layers that hold a state of fixed size: linear attention, state-space layers, convolutions."""
CACHELESS_KINDS = ("moe", "mlp")
WINDOW_FIELDS = ("sliding_window", "interleaved_sliding_window")


def unusual_attention(config: Any) -> list[str]:
    """What the layers have that head pages do not hold, or that our attention does not do.

    Args:
        config: of the text model, in transformers' format.

    Returns:
        for each kind, words that follow "does not support".
    """
    key_dim, value_dim = getattr(config, "head_dim", None), getattr(config, "v_head_dim", None)
    if key_dim is None and getattr(config, "num_attention_heads", None):
        key_dim = getattr(config, "hidden_size", 0) // config.num_attention_heads
    sparse = getattr(config, "sparse_attention_config", None) or {}  # of MiniMax M3
    is_latent = bool(getattr(config, "kv_lora_rank", None))
    problems = [
        (any(sparse.get("sparse_attention_freq") or ()), "block-sparse attention"),
        (
            not is_latent and None not in (key_dim, value_dim) and key_dim != value_dim,
            f"value heads of {value_dim} beside key heads of {key_dim}",
        ),
        (
            (getattr(config, "num_kv_shared_layers", None) or 0) > 0,
            "layers that share another layer's KV cache",
        ),
        (_is_varied(config), VARIED),
        (_has_alibi(config), "ALiBi"),
        (
            (getattr(config, "param_sink_number", None) or 0) > 0,  # of openPangu
            "learned keys and values before the first token",
        ),
    ]
    return [what for present, what in problems if present]


def caps_logits(config: Any) -> bool:
    """Whether attention logits pass through a cap, as Gemma 2's do."""
    return bool(getattr(config, "attn_logit_softcapping", None))


def has_sinks(config: Any) -> bool:
    """Whether a learned logit of each query head joins its softmax, as gpt-oss has them."""
    kind = str(getattr(config, "model_type", None))
    names_layers = getattr(config, "layer_types", None) is not None
    if kind.startswith("granite") and kind != "granitemoehybrid" and names_layers:
        return bool(getattr(config, "attention_sinks", True))  # as vLLM reads it
    return kind == "gpt_oss" or any(getattr(config, field, None) for field in SINK_FIELDS)


def _has_alibi(config: Any) -> bool:
    inner = getattr(config, "attn_config", None)
    nested = inner.get("alibi") if isinstance(inner, dict) else getattr(inner, "alibi", None)
    position = str(getattr(config, "position_embedding_type", "")).lower()
    flagged = getattr(config, "alibi", None) or nested
    by_kind = getattr(config, "model_type", None) in ("bloom", "step1")
    return bool(flagged) or position == "alibi" or by_kind


def _is_varied(config: Any) -> bool:
    """Whether layers differ in how many KV heads they have, or how large those are."""
    for name, global_name in (
        ("head_dim", "global_head_dim"),
        ("num_key_value_heads", "num_global_key_value_heads"),
    ):
        other = getattr(config, global_name, None)
        if other and other != getattr(config, name, None):
            return True
    for name in ("num_key_value_heads", "num_kv_heads", "head_dim"):
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and len(set(value)) > 1:
            return True
    groups = {_field(attention, "n_heads_in_group") for attention in _attention_blocks(config)}
    return len(groups) > 1


def full_attention_layers(config: Any, num_tokens: int | None = None) -> list[int] | None:
    """Which layers attend to the whole context, where a configuration tells the layers apart.

    Args:
        config: of the text model, in transformers' format.
        num_tokens: of the longest context. A window that holds all of it counts as full attention;
            None: no window does.

    Returns:
        their indices among all layers; None when the configuration knows one kind of layer only.
    """
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return None
    full = set(FULL_KINDS)
    if num_tokens is not None and not slides_within(config, num_tokens):
        full.add(SLIDING_KIND)
    return [index for index, kind in enumerate(kinds) if kind in full]


def layers_by_kind(config: Any) -> dict[str, int]:
    """How many layers a model has of each kind, where a configuration tells the layers apart.

    Args:
        config: of the text model, in transformers' format.

    Returns:
        numbers of layers by transformers' name of their kind; empty when the configuration knows
        one kind of layer only.
    """
    return dict(Counter(getattr(config, "layer_types", None) or ()))


def unknown_kinds(config: Any) -> list[str]:
    """Kinds of layers of which it is not known what they hold.

    Args:
        config: of the text model, in transformers' format.

    Returns:
        transformers' names of them, such as that of layers with attention and a state.
    """
    known = {*FULL_KINDS, SLIDING_KIND, *STATE_KINDS, *CACHELESS_KINDS}
    return [kind for kind in layers_by_kind(config) if kind not in known]


def attention_layers_and_kv_heads(config: Any, num_tokens: int | None = None) -> tuple[int, int]:
    """How many layers attend to the whole context, and how many KV heads each has.

    Args:
        config: of the text model, in transformers' format.
        num_tokens: see :func:`full_attention_layers`.

    Raises:
        AttributeError, TypeError: if it says nothing of heads.
    """
    num_layers, num_heads = config.num_hidden_layers, config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    if blocks := _attention_blocks(config):
        num_layers = len(blocks)
        num_kv_heads = num_heads // _field(blocks[0], "n_heads_in_group")
    if full := full_attention_layers(config, num_tokens):  # a model of windows only fits in them
        num_layers = len(full)
    return num_layers, num_kv_heads


def _attention_blocks(config: Any) -> list[Any]:
    """What Llama-Nemotron says of each layer that has attention; empty for other models."""
    layers = getattr(config, "block_configs", None) or ()
    attention = [_field(layer, "attention") for layer in layers]
    return [block for block in attention if block and not _field(block, "no_op")]


def _field(values: Any, name: str) -> Any:
    """A field of a part of a configuration, which may be a dictionary."""
    return values.get(name) if isinstance(values, dict) else getattr(values, name, None)


def sliding_window(config: Any) -> int | None:
    """Tokens that the narrowest layer looks back on, its own among them.

    Args:
        config: of the text model, in transformers' format.

    Returns:
        None when no layer slides; 0 when some layers do, and how far is not said.
    """
    windows: list[int] = []
    for field in WINDOW_FIELDS:
        value = getattr(config, field, None)
        values = value if isinstance(value, list | tuple) else [value]
        windows += [window for window in values if isinstance(window, int) and window > 0]
    if windows:
        return min(windows)
    return 0 if SLIDING_KIND in (getattr(config, "layer_types", None) or ()) else None


def slides_within(config: Any, num_tokens: int) -> bool:
    """Whether any layer of a model loses sight of the first of so many tokens.

    A window that holds all of them slides nowhere: the layer then attends like any other.
    """
    window = sliding_window(config)
    return window is not None and window < num_tokens
