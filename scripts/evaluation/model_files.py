"""What scripts read from a model's folder: the shape of its attention, how to make it repeat."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.head_profiles.head_profile import (
    ModelFingerprint,
    find_profile,
    load_profile,
    profile_folders,
)
from vllm_kvzip.head_profiles.repeat_prompt import repeat_wording
from vllm_kvzip.model.attention_kinds import attention_layers_and_kv_heads


def fingerprint_from_config(config: Any, name: str) -> ModelFingerprint:
    """What a head profile must match.

    Args:
        config: of the model, in transformers' format.
        name: of the model, for people.

    Raises:
        AttributeError, TypeError, ValueError: if the configuration says nothing of heads.
    """
    text = config.get_text_config()
    if not config.architectures:
        raise ValueError("its config.json names no architectures")
    num_heads = text.num_attention_heads
    num_layers, num_kv_heads = attention_layers_and_kv_heads(text)
    return ModelFingerprint(
        architecture=config.architectures[0],
        num_layers=num_layers,
        num_query_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // num_heads,
        name=name,
    )


def fingerprint_of(model: str) -> ModelFingerprint:
    """What the configuration in a model's folder says of its attention.

    Raises:
        ProfileError: if it cannot be read or says nothing of heads.
    """
    try:
        config = AutoConfig.from_pretrained(model)
        return fingerprint_from_config(config, Path(os.path.abspath(model)).name)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ProfileError(
            f"--model {model} has no configuration to compare with: {reason}."
        ) from error


def repeat_ids(model: str, fingerprint: ModelFingerprint, wording: str | None) -> list[list[int]]:
    """Token ids that ask for a context, first chunk and later ones, as the plugin asks.

    Args:
        model: folder.
        fingerprint: decides which head profile belongs to the model.
        wording: of the user; else that of the profile, else KVzip's own.

    Raises:
        ValueError: if the wording has no token.
    """
    found = find_profile(fingerprint, profile_folders()) if wording is None else None
    provenance = load_profile(found).provenance if found else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    return list(repeat_wording(wording, provenance, tokenizer).token_ids(tokenizer))
