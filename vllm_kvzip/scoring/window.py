"""SnapKV: the attention of the last prompt tokens (arXiv 2404.14469)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import max_pool1d

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.core import LayerInputs

POOLING_TOKENS = 5


@register_scorer
class WindowScorer(Scorer):
    """Attention the observation window pays to each key: mean over queries, max over the group.

    Softmax runs over the keys of the prefix that a query may see; the few dense keys behind the
    boundary are the same for all and are left out. A max-pool over neighbours (section 4.2 of the
    paper) keeps the tokens around a peak.
    """

    name: ClassVar[str] = "window"
    needs_observation_queries: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when the queries were not collected."""
        queries = inputs.observation_queries
        if queries is None:
            raise ValueError("Scorer 'window' needs the queries of the last prompt tokens.")
        num_queries, num_tokens = queries.shape[0], inputs.keys.shape[1]
        logits = torch.einsum("whgd,htd->hgwt", queries, inputs.keys) * inputs.scale
        device = logits.device
        positions = (
            inputs.num_context_tokens - num_queries + torch.arange(num_queries, device=device)
        )
        hidden = torch.arange(num_tokens, device=device)[None, :] > positions[:, None]
        logits = logits.masked_fill(hidden, float("-inf"))
        attention = logits.softmax(dim=-1).nan_to_num_(
            0.0
        )  # a query that sees no prefix key: zeros
        scores = attention.mean(dim=2).amax(dim=1)  # [H, T]
        padding = POOLING_TOKENS // 2
        return max_pool1d(scores, POOLING_TOKENS, stride=1, padding=padding)
