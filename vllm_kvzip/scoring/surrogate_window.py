"""Scorer ``surrogate``, in rounds times the attention of the last tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_kvzip.scoring.base import register_scorer
from vllm_kvzip.scoring.observed import pooled_attention
from vllm_kvzip.scoring.surrogate import SurrogateScorer

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class SurrogateWindowScorer(SurrogateScorer):
    """What the networks predict of a pair, in rounds times the attention the window pays it.

    The networks say what a pair is worth to any text that follows; attention says which of these
    pairs the text of the moment uses. A context is asked other questions later, so prompts and
    contexts are scored as scorer ``surrogate`` does, and shared in the same way.
    """

    name: ClassVar[str] = "surrogate-window"
    comparable_across_parts: ClassVar[bool] = False
    needs_observation_queries: ClassVar[bool] = True
    observes_rounds_only: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when the values were not collected."""
        scores = super().score_layer(inputs)
        if inputs.observation_queries is None:
            return scores
        return scores.mul_(pooled_attention(inputs, inputs.observation_queries))
