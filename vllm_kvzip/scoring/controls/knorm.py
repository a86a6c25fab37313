"""Key norm: keep the keys of small norm (arXiv 2406.11430)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class KeyNormScorer(Scorer):
    """Minus the L2 norm of a key: keys of small norm tend to draw attention."""

    name: ClassVar[str] = "knorm"
    comparable_across_parts: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        norms: torch.Tensor = inputs.keys.norm(dim=-1)
        return -norms
