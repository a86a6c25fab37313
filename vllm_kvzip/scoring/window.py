"""SnapKV: the attention of the last prompt tokens (arXiv 2404.14469)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_kvzip.scoring.base import Scorer, register_scorer
from vllm_kvzip.scoring.observed import pooled_attention

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class WindowScorer(Scorer):
    """Attention the observation window pays to each key: mean over queries, max over the group."""

    name: ClassVar[str] = "window"
    needs_observation_queries: ClassVar[bool] = True
    rescores_kept: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when the queries were not collected."""
        queries = inputs.observation_queries
        if queries is None:
            raise ValueError("Scorer 'window' needs the queries of the last prompt tokens.")
        return pooled_attention(inputs, queries)
