"""What a context's length and keep ratio say: how it is compressed, or why it is not."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from vllm_kvzip.errors import LeftAloneError, RequestError
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.vllm_bridge.drafts import rule_with_drafts
from vllm_kvzip.vllm_bridge.settings import Settings, cache_shape, pool_blocks

if TYPE_CHECKING:
    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

OUTPUT_TOKENS = 2
"""The prefix is compacted at the start of the step after the one that completes it."""


def plan_context(
    vllm_config: VllmConfig, num_tokens: int, keep_ratio: float | None = None
) -> PrefixPlan:
    """The plan of a context that is a prompt of its own.

    Args:
        vllm_config: of the engine.
        num_tokens: of the context.
        keep_ratio: its own; None: the server's.

    Raises:
        LeftAloneError: if it is too short to be compressed, would free nothing, or does not fit
            together with its compressed form.
        RequestError: if the server keeps no contexts, or the context is too long.
    """
    cache, model = vllm_config.cache_config, vllm_config.model_config
    if not cache.enable_prefix_caching:
        raise RequestError(
            "Prefix caching is off on this server, so no compressed context can be kept; start "
            "vLLM without --no-enable-prefix-caching."
        )
    longest = model.max_model_len - OUTPUT_TOKENS
    if num_tokens > longest:
        raise RequestError(
            f"The context has {num_tokens} tokens, more than the {longest} that leave room "
            f"for {OUTPUT_TOKENS} more in max_model_len {model.max_model_len}."
        )
    settings = Settings.from_vllm_config(vllm_config)
    rule = rule_with_drafts(settings.rule(*cache_shape(vllm_config)), vllm_config)
    rule = dataclasses.replace(rule, pool_blocks=pool_blocks(vllm_config) or None)
    options = RequestOptions(context_tokens=num_tokens, keep_ratio=keep_ratio)
    plan = rule.plan(num_tokens, options)
    if plan is None:
        raise _left_alone(rule, num_tokens, options)
    return plan


def _left_alone(rule: PrefixRule, num_tokens: int, options: RequestOptions) -> LeftAloneError:
    reason = rule.skip_reason(num_tokens, options) or "nothing_to_free"
    sentence = (
        f"Nothing would be freed: keep_ratio {rule.wanted_ratio(options)} of the context's "
        f"{num_tokens} tokens needs as many blocks as they have."
    )
    if reason == "no_room":
        sentence = (
            f"The context has {num_tokens} tokens, which fit into the KV cache of "
            f"{rule.pool_blocks} blocks, but not together with their compressed form."
        )
    if reason == "below_min_prompt_tokens":
        sentence = (
            f"The context has {num_tokens} tokens and is left alone: min_prompt_tokens is "
            f"{rule.min_prompt_tokens}, and a block holds {rule.block_size} tokens."
        )
    return LeftAloneError(sentence, reason)
