"""What tells vLLM's attention layers that a pass is ours; and attention that passes share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from vllm_kvzip.model.fused_attention import attend_with_normaliser


class PassMetadata(ABC):
    """Attention metadata of a pass that is ours and not one of vLLM's steps."""

    @abstractmethod
    def attend(
        self,
        layer: Any,
        impl: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        """Attention of one layer.

        Args:
            layer: vLLM's attention layer.
            impl: vLLM's attention implementation; holds scale, soft cap and learned logits.
            query: ``[num_tokens, H * G, D]``.
            key, value: ``[num_tokens, H, D]``.
            output: like ``query``; written.
        """


def logit_terms(impl: Any) -> dict[str, Any]:
    """What an attention implementation of vLLM's adds to its logits, as our torch attention has it.

    One row a query head: ``attend_with_normaliser`` and ``attend_within_window`` take both.
    """
    sinks = None if impl.sinks is None else impl.sinks.float()[:, None]
    return {"soft_cap": impl.logits_soft_cap, "sink_logits": sinks}


def attend_over_both(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    own_keys: torch.Tensor,
    own_values: torch.Tensor,
    impl: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over cached tokens, and causally over the repeated tokens themselves.

    Args:
        queries: ``[H, G * R, D]``, group member after group member.
        keys, values: ``[H, K, D]``, cached; every query sees them.
        own_keys, own_values: ``[H, R, D]``.
        impl: holds scale, soft cap and learned logits.

    Returns:
        ``[H, G * R, D]``, and the log of each softmax's normaliser, float32 ``[H, G * R]``.
    """
    num_heads, num_rows, _ = own_keys.shape
    group = queries.shape[1] // num_rows
    sinks = None
    if impl.sinks is not None:
        sinks = impl.sinks.float().view(num_heads, group).repeat_interleave(num_rows, dim=1)
    how: dict[str, Any] = {"scale": impl.scale, "soft_cap": impl.logits_soft_cap}
    cached, cached_log = attend_with_normaliser(
        queries, keys, values, causal=False, sink_logits=sinks, **how
    )
    own, own_log = attend_with_normaliser(
        queries.reshape(num_heads * group, num_rows, -1),
        own_keys.repeat_interleave(group, dim=0),
        own_values.repeat_interleave(group, dim=0),
        causal=True,
        **how,
    )
    own_log = own_log.reshape(cached_log.shape)
    log_normaliser = torch.logaddexp(cached_log, own_log)
    share = (own_log - log_normaliser).exp()[..., None]
    attended = torch.lerp(cached.float(), own.reshape(cached.shape).float(), share)
    return attended.to(queries.dtype), log_normaliser
