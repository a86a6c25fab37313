"""A network that was trained to predict KVzip's scores (after KVzap, arXiv 2601.07891)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vllm_kvzip.scoring.base import Scorer, ScorerSettings, register_scorer
from vllm_kvzip.surrogate import MIN_LOG_SCORE, load_surrogate

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.config import Budget
    from vllm_kvzip.core import LayerInputs


@register_scorer
class SurrogateScorer(Scorer):
    """The predicted score of scorer ``kvzip``, for a small part of its cost.

    Raises:
        ProfileError: if the file that the settings name is missing or broken.
    """

    name: ClassVar[str] = "surrogate"
    scores_last: ClassVar[bool] = True
    default_budget: ClassVar[Budget | None] = "adaptive"
    needs_values: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    needs_surrogate: ClassVar[bool] = True

    def __init__(self, settings: ScorerSettings) -> None:
        super().__init__(settings)
        if settings.surrogate is None:
            raise ValueError("Scorer 'surrogate' needs the file of its networks.")
        self._layers = load_surrogate(Path(settings.surrogate))

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``, in (0, 1]; ValueError when the values were not collected."""
        if inputs.values is None:
            raise ValueError("Scorer 'surrogate' needs values.")
        network = self._layers[inputs.layer]
        if network.mix.device != inputs.keys.device:
            network = self._layers[inputs.layer] = network.to(inputs.keys.device)
        predicted = network.log_scores_of(inputs.keys, inputs.values, inputs.rotary)
        return predicted.clamp_(MIN_LOG_SCORE, 0.0).exp_().t().contiguous()
