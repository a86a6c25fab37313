"""R-KV: attention of the last tokens, less what is said again (arXiv 2505.24133)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import max_pool1d, normalize

from vllm_kvzip.model.capped_attention import cap_logits_
from vllm_kvzip.model.slices import group_slices, token_slices
from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.config import Budget
    from vllm_kvzip.layer_inputs import LayerInputs

IMPORTANCE_SHARE = 0.1  # lambda of the paper
WINDOW_TOKENS = 8
POOLING_TOKENS = 7
SIMILAR = 0.5  # cosine from which two keys say the same


@register_scorer
class RKVScorer(Scorer):
    """The paper's rule, for comparison: ``lambda * importance - (1 - lambda) * redundancy``.

    Importance (section 3.2): the most logit over the query group, softmax over the pairs before the
    window, mean over the last 8 queries, and a max-pool over 7 neighbours. Redundancy (section
    3.3): a key's mean cosine similarity to the keys of its head, as they are cached, and softmax
    over them; the similarity of each key to the last one that is like it does not count, so the
    last of several like keys stays. Every head gets the same budget.
    """

    name: ClassVar[str] = "r-kv"
    default_budget: ClassVar[Budget | None] = "uniform"
    needs_observation_queries: ClassVar[bool] = True
    rescores_kept: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when the queries were not collected."""
        if inputs.observation_queries is None:
            raise ValueError("Scorer 'r-kv' needs the queries of the last tokens.")
        scores = redundancy(inputs).mul_(IMPORTANCE_SHARE - 1)
        return scores.add_(importance(inputs), alpha=IMPORTANCE_SHARE)


def importance(inputs: LayerInputs) -> torch.Tensor:
    """Pooled attention of the last queries to the pairs before them, float32 ``[H, T]``."""
    assert inputs.observation_queries is not None
    queries = inputs.observation_queries[-WINDOW_TOKENS:] * inputs.scale
    window, _, group_size, _ = queries.shape
    keys = inputs.keys
    logits = keys.new_full((len(keys), window, keys.shape[1]), float("-inf"))
    for part in group_slices(keys, group_size, 2 * logits.numel()):
        some = queries[:, :, part].permute(1, 2, 0, 3)  # [H, S, W, D]
        products = cap_logits_(some @ keys[:, None].transpose(2, 3), inputs.soft_cap)
        logits = logits.maximum(products.amax(dim=1))
    everything = slice(0, keys.shape[1])
    hidden = inputs.positions_of(everything) >= inputs.num_context_tokens - window
    hidden = hidden.expand(keys.shape[:2])
    if inputs.real is not None:
        hidden = hidden | ~inputs.real
    attention = logits.masked_fill_(hidden[:, None], float("-inf")).softmax(dim=-1)
    attention = attention.nan_to_num_(0.0).mean(dim=1)  # NaN: there is nothing before the window
    return max_pool1d(attention, POOLING_TOKENS, stride=1, padding=POOLING_TOKENS // 2)


def redundancy(inputs: LayerInputs) -> torch.Tensor:
    """Softmax of each key's mean similarity to its head's keys, float32 ``[H, T]``; 0 for pads."""
    keys = normalize(inputs.keys, dim=-1)
    num_heads, num_tokens, _ = keys.shape
    places = torch.arange(num_tokens, device=keys.device)
    total = torch.zeros_like(keys[..., 0])
    for part in token_slices(keys, 5 * num_heads * num_tokens):
        likeness = keys[:, part] @ keys.transpose(1, 2)  # [H, S, T]
        likeness.masked_fill_(places[part, None] == places, 0.0)
        last = torch.where(likeness > SIMILAR, places, -1).amax(dim=2, keepdim=True)
        total += likeness.masked_fill_(last == places, 0.0).sum(dim=1)
    if inputs.real is None:
        return total.div_(num_tokens).softmax(dim=1)
    mean = total / inputs.real.sum(dim=1, keepdim=True)
    return mean.masked_fill_(~inputs.real, float("-inf")).softmax(dim=1)
