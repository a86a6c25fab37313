"""Attention that the observation window pays to each key, in parts of bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import max_pool1d

from vllm_kvzip.model.capped_attention import cap_logits_
from vllm_kvzip.model.slices import group_slices, token_slices

if TYPE_CHECKING:
    from vllm_kvzip.layer_inputs import LayerInputs


POOLING_TOKENS = 5


def pooled_attention(inputs: LayerInputs, queries: torch.Tensor) -> torch.Tensor:
    """:func:`observed_attention`, of each key the most that it or its neighbours get.

    A max-pool over neighbours (SnapKV, arXiv 2404.14469, section 4.2) keeps the tokens around a
    peak. In rounds neighbours are pairs that a head kept side by side.
    """
    attention = observed_attention(inputs, queries)
    return max_pool1d(attention, POOLING_TOKENS, stride=1, padding=POOLING_TOKENS // 2)


def observed_attention(inputs: LayerInputs, queries: torch.Tensor) -> torch.Tensor:
    """Attention of the last queries to each key: mean over queries, max over the query group.

    Softmax runs over the keys that are given and that a query may see; the few dense keys after the
    boundary are the same for all and are left out.

    Args:
        inputs: of the layer.
        queries: float32 ``[W, H, G, D]``; the last one is at ``num_context_tokens - 1``.

    Returns:
        float32 ``[H, T]``, in [0, 1]; 0 for pads.
    """
    keys = inputs.keys
    window, num_heads, group_size, head_dim = queries.shape
    scores = keys.new_full(keys.shape[:2], float("-inf"))
    for part in group_slices(keys, group_size, num_heads * 2 * window * head_dim):
        sinks = None if inputs.sink_logits is None else inputs.sink_logits[:, part]
        _attend(queries[:, :, part], inputs, sinks, scores)
    return scores


def _attend(
    queries: torch.Tensor,
    inputs: LayerInputs,
    sinks: torch.Tensor | None,
    scores: torch.Tensor,
) -> None:
    """Attention of some members of the group, mean over queries; each key keeps the most it got.

    Two passes over parts of the keys: all logits at once may be far more than the keys.

    Args:
        queries: float32 ``[W, H, G, D]``.
        inputs: of the layer.
        sinks: float32 ``[H, G]``, learned logits of these members; None: there are none.
        scores: float32 ``[H, T]``; raised.
    """
    keys, device = inputs.keys, inputs.keys.device
    window, num_heads, group_size, _ = queries.shape
    first = inputs.num_context_tokens - window
    positions = torch.arange(first, first + window, device=device)
    queries = queries.permute(1, 2, 0, 3).flatten(1, 2) * inputs.scale  # [H, G * W, D]

    def logits_of(part: slice) -> torch.Tensor:
        """Of some keys, float32 ``[H, G, W, S]``; minus infinity where a query sees none."""
        logits = cap_logits_(queries @ keys[:, part].transpose(1, 2), inputs.soft_cap)
        logits = logits.view(num_heads, group_size, window, -1)
        hidden = inputs.positions_of(part)[..., None, :] > positions[:, None]  # [..., W, S]
        if inputs.real is not None:
            hidden = (hidden | ~inputs.real[:, None, part])[:, None]
        return logits.masked_fill_(hidden, float("-inf"))

    parts = list(token_slices(keys, 3 * num_heads * group_size * window))
    total = keys.new_full((num_heads, group_size, window), float("-inf"))
    if sinks is not None:
        total = sinks[..., None].expand_as(total)
    for part in parts:
        total = torch.logaddexp(total, logits_of(part).logsumexp(dim=-1))
    total = total.masked_fill(total == float("-inf"), 0.0)  # a query that sees no key of the prefix
    for part in parts:
        attention = logits_of(part).sub_(total[..., None]).exp_()
        scores[:, part] = scores[:, part].maximum(attention.mean(dim=2).amax(dim=1))
