"""Which models can be watched while they repeat, and what is said of the others."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.model.attention_kinds import (
    FULL_KINDS,
    STATE_KINDS,
    caps_logits,
    full_attention_layers,
    has_sinks,
    slides_within,
    sliding_window,
    unknown_kinds,
    unusual_attention,
)
from vllm_kvzip.profiling.context_cache import copy_of
from vllm_kvzip.profiling.masked_model import MaskedModel

if TYPE_CHECKING:
    from collections.abc import Sequence

TRIED_TOKENS = 128
MOST_DIFFERENCE = 0.05  # of the norm of a token's logits; rounding makes less than a thousandth


def refuse_unsupported(model: str, config: Any, context_tokens: int) -> None:
    """Refuse what is known from the configuration to have no whole KV heads to score.

    Args:
        model: as the user named it.
        config: of the text model, in transformers' format.
        context_tokens: of the contexts; a sliding window that holds them slides nowhere.

    Raises:
        ProfileError: for latent (MLA) and chunked attention, for models whose layers all have a
            sliding window or a state, for learned and capped logits, and for what KV compression
            does not support.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - set(FULL_KINDS)
    others = ", ".join(sorted(unknown_kinds(config)))
    full = full_attention_layers(config)
    window, remedy = sliding_window(config), "choose another model"
    if getattr(config, "kv_lora_rank", None):
        reason = "multi-head latent attention (MLA) caches no keys per head"
    elif unusual := unusual_attention(config):
        reason = f"KV compression does not support {unusual[0]}"
    elif others:
        reason = f"KV compression does not support its layers of {others}"
    elif not full and kinds & set(STATE_KINDS):
        reason = "none of its layers attends to the whole context"
    elif not full and slides_within(config, context_tokens):
        reason = "none of its layers attends to the whole context; all have sliding_attention"
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
    if kind is None or kind._supports_attention_backend:
        return
    # Some models ask for the attention that was registered and do not say so.
    if not hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ProfileError(
            f"--model {model} cannot be profiled: transformers lets nobody watch the attention of "
            f"{kind.__name__}; let the engine profile it (--kv-compression-config.profile build)."
        )


@torch.inference_mode()
def refuse_lost_states(model: str, probe: MaskedModel, context_ids: Sequence[int]) -> None:
    """Refuse a model that reads a text otherwise when it is read in two parts.

    What repeats a context is read after it, from the states and windows that the context left.
    transformers starts some kinds of layers from nothing there.

    Args:
        model: as the user named it.
        probe: the model.
        context_ids: a context, whose first tokens are read.

    Raises:
        ProfileError: for such a model.
    """
    ids = list(context_ids[:TRIED_TOKENS])
    half = len(ids) // 2
    if probe.scores_all or not half:
        return
    whole = probe.model(torch.tensor([ids]), logits_to_keep=len(ids) - half).logits[0]
    cache = copy_of(probe.read(ids[:half]), probe.scored)
    parts = probe.model(torch.tensor([ids[half:]]), past_key_values=cache).logits[0]
    differences = (parts - whole).norm(dim=-1) / whole.norm(dim=-1)
    if not bool(differences.max() < MOST_DIFFERENCE):
        raise ProfileError(
            f"--model {model} cannot be profiled: in this version of transformers its layers "
            f"do not go on from the state that a context leaves; run it with scorer keydiff or "
            f"expected-attention, which need no profile."
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
