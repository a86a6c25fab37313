"""Which methods of speculative decoding go together with KV compression, said at start-up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.drafts import DRAFTS, FROM_TOKENS

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig


def speculation_problems(vllm_config: VllmConfig, is_mixed: bool) -> list[tuple[bool, str]]:
    """What is refused of speculative decoding: whether it is there, and the words for it.

    Args:
        vllm_config: of the engine.
        is_mixed: whether some layers of the model are compressed and others are left alone.
    """
    speculative = vllm_config.speculative_config
    if speculative is None or speculative.method in FROM_TOKENS:
        return []
    method = speculative.method
    if method not in DRAFTS:
        known = ", ".join((*FROM_TOKENS, *DRAFTS))
        return [(True, f"speculative method {method} yet; use one of {known}, or none")]
    return [
        (
            bool(speculative.parallel_drafting),
            f"speculative method {method} with parallel drafting yet; set parallel_drafting to "
            f"false",
        ),
        (
            bool(vllm_config.use_v2_model_runner and speculative.use_multi_module_mtp()),
            "several MTP layers on vLLM's model runner V2 yet, which computes tokens of the prefix "
            "anew; set num_speculative_tokens to 1, or VLLM_USE_V2_MODEL_RUNNER to 0",
        ),
        (
            bool(speculative.enable_adaptive_verification),
            f"speculative method {method} with adaptive verification yet; set "
            f"enable_adaptive_verification to false",
        ),
        (
            is_mixed,
            f"speculative method {method} beside layers with a sliding window or a state yet; use "
            f"ngram or none",
        ),
        *_shape_problems(vllm_config),
    ]


def _shape_problems(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    """A draft's layers have their part of the same blocks, so their heads must be the target's."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config
    if draft is None:
        return []
    target, parallel = vllm_config.model_config, vllm_config.parallel_config
    shapes = [
        (
            model.get_num_attention_heads(ranks),
            model.get_num_kv_heads(ranks),
            model.get_head_size(),
        )
        for model, ranks in (
            (draft, speculative.draft_parallel_config or parallel),
            (target, parallel),
        )
    ]
    return [
        (
            shapes[0] != shapes[1],
            "a draft model whose layers have {} query heads and {} KV heads of size {}".format(
                *shapes[0]
            )
            + ", where the model's have {}, {} and {}; use another draft model, or ngram".format(
                *shapes[1]
            ),
        )
    ]
