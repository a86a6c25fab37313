"""What an engine's configuration says of a draft model's layers, before they are there."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.fingerprint import model_fingerprint

if TYPE_CHECKING:
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

FROM_TOKENS = ("ngram", "suffix")
"""Speculative methods that guess from a request's tokens, and hold nothing in the KV cache."""

DRAFTS = ("draft_model", "eagle", "eagle3", "mtp")
"""Methods whose draft has layers in the KV cache, which keep every KV pair of a prefix."""


def has_draft_layers(vllm_config: VllmConfig) -> bool:
    """Whether a draft model's layers are in the KV cache."""
    speculative = vllm_config.speculative_config
    return speculative is not None and speculative.method in DRAFTS


def num_draft_layers(vllm_config: VllmConfig) -> int:
    """How many there are."""
    if not has_draft_layers(vllm_config):
        return 0
    draft = vllm_config.speculative_config.draft_model_config
    return 0 if draft is None else int(draft.get_total_num_hidden_layers())


def num_guessed_tokens(vllm_config: VllmConfig) -> int:
    """How many of a request's computed tokens may be guesses that are taken back.

    Those of a step, and with asynchronous scheduling those of the step before it, of which the
    scheduler has not heard when it schedules.
    """
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else 2 * int(speculative.num_speculative_tokens)


def rule_with_drafts(rule: PrefixRule, vllm_config: VllmConfig) -> PrefixRule:
    """A rule of what is compressed that knows of a draft model's layers, as the workers' does.

    Args:
        rule: of the settings.
        vllm_config: of the engine.
    """
    drafts = num_draft_layers(vllm_config)
    if not drafts:
        return rule
    num_layers = model_fingerprint(vllm_config).num_layers + drafts
    return replace(rule, num_layers=num_layers, num_dense_layers=drafts)
