"""Which models can be watched while they repeat, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.model.attention_kinds import (
    caps_logits,
    has_sinks,
    slides_within,
    sliding_window,
    unusual_attention,
)
from vllm_kvzip.profiling.masked_model import MaskedModel


def refuse_unsupported(model: str, config: Any, context_tokens: int) -> None:
    """Refuse what is known from the configuration to have no whole KV heads to score.

    Args:
        model: as the user named it.
        config: of the text model, in transformers' format.
        context_tokens: of the contexts; a sliding window that holds them slides nowhere.

    Raises:
        ProfileError: for latent (MLA), sliding-window, linear and convolutional attention, for
            learned and capped logits, and for what KV compression does not support.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    others = ", ".join(sorted(kinds - {"sliding_attention"}))
    window, remedy = sliding_window(config), "choose another model"
    if getattr(config, "kv_lora_rank", None):
        reason = "multi-head latent attention (MLA) caches no keys per head"
    elif unusual := unusual_attention(config):
        reason = f"KV compression does not support {unusual[0]}"
    elif others:
        reason = f"every layer must attend to the whole context, and it has {others}"
    elif slides_within(config, context_tokens):
        reason = "every layer must attend to the whole context, and it has sliding_attention"
        if window:
            reason += f" with sliding_window={window}"
            remedy = f"set --context-tokens to {window} or less, or {remedy}"
    elif has_sinks(config) or caps_logits(config):
        what = "learned attention sinks" if has_sinks(config) else "capped attention logits"
        reason = f"torch's attention, which runs it here, knows nothing of {what}"
        remedy = "let the engine profile it (--kv-compression-config.profile build)"
    else:
        return
    raise ProfileError(f"--model {model} cannot be profiled: {reason}; {remedy}.")


def refuse_unwatchable(model: str, config: Any) -> None:
    """Refuse a model that transformers runs with attention of its own.

    Args:
        model: as the user named it.
        config: of the model, in transformers' format.

    Raises:
        ProfileError: for such a model.
    """
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is not None and not kind._supports_attention_backend:
        raise ProfileError(
            f"--model {model} cannot be profiled: transformers lets nobody watch the attention of "
            f"{kind.__name__}; let the engine profile it (--kv-compression-config.profile build)."
        )


def load_probe(model: str, context_tokens: int) -> tuple[MaskedModel, Any]:
    """The model, ready to be watched, and its tokenizer.

    Raises:
        ProfileError: if it cannot be loaded or is of an unsupported kind.
    """
    folder = Path(model)
    try:
        if not folder.is_dir() and (folder.is_absolute() or model.startswith(".")):
            raise FileNotFoundError("there is no such folder.")
        path = os.path.abspath(folder) if folder.is_dir() else model  # "." has no name
        config = AutoConfig.from_pretrained(path)
        refuse_unsupported(model, config.get_text_config(), context_tokens)
        refuse_unwatchable(model, config)
        probe = MaskedModel(path)
        _ = probe.fingerprint  # needs attention heads in the configuration
        return probe, AutoTokenizer.from_pretrained(path)
    except ProfileError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ProfileError(f"--model {model} cannot be profiled: {reason}") from error
