"""KeyDiff: keep the keys that differ most from the others (arXiv 2504.15364)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from torch.nn.functional import normalize

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class KeyDiffScorer(Scorer):
    """Minus the cosine similarity of a key to the mean of its head's normalised keys (eq. 3).

    Needs neither queries nor a forward pass, and is bounded in [-1, 1] for every head.
    """

    name: ClassVar[str] = "keydiff"
    comparable_across_parts: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        keys = normalize(inputs.keys, dim=-1)  # [H, T, D]
        anchor = normalize(keys.mean(dim=1), dim=-1)  # [H, D]
        return -(keys @ anchor[:, :, None]).squeeze(-1)
