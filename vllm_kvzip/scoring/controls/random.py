"""Random scores: the control that every table must contain."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class RandomScorer(Scorer):
    """Uniform scores, other ones in each layer and head, the same ones for the same prompt."""

    name: ClassVar[str] = "random"
    comparable_across_parts: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        generator = torch.Generator().manual_seed(inputs.seed * inputs.num_layers + inputs.layer)
        scores = torch.rand(inputs.keys.shape[:2], generator=generator)
        return scores.to(inputs.keys.device)
