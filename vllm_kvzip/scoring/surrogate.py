"""Networks that predict how much each KV pair matters (after KVzap, arXiv 2601.07891)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_kvzip.head_profiles.networks import (
    MIN_LOG_SCORE,
    RECENCY_TOKENS,
    load_surrogate,
    recency,
)
from vllm_kvzip.model.slices import token_slices
from vllm_kvzip.scoring.base import Scorer, ScorerSettings, register_scorer
from vllm_kvzip.scoring.contrast import contrast, ramp

if TYPE_CHECKING:
    from vllm_kvzip.config import Budget
    from vllm_kvzip.layer_inputs import LayerInputs

MOST_CONTRAST = 2.0  # power of the contrast where little is kept
CONTRAST_FROM, CONTRAST_FULLY = 0.1, 0.05  # keep ratios between which it comes in


def contrast_power(keep_ratio: float) -> float:
    """How much the contrast counts beside the predicted score: nothing from keep ratio 0.1 on.

    Above it the pairs that decide what the model repeats are the right ones. Where only the best
    few are kept, nearly all of them score high, and those that stand out are worth more.
    A pair that a head always returns to does not stand out, so contrast must not count sooner.
    """
    return MOST_CONTRAST * ramp(keep_ratio, CONTRAST_FROM, CONTRAST_FULLY)


@register_scorer
class SurrogateScorer(Scorer):
    """Influence, or the score of scorer ``kvzip``, predicted for a small part of its cost.

    The head profile says which, see ``head_profiles/influence.py``. Where little is kept it is
    multiplied by a power of scorer ``contrast``. The networks read how recent a pair is, so in
    rounds what is kept is scored anew: it has grown older.

    Raises:
        ProfileError: if the file that the settings name is missing or broken.
    """

    name: ClassVar[str] = "surrogate"
    comparable_across_parts: ClassVar[bool] = True
    rescores_kept: ClassVar[bool] = True
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
        """Float32 ``[H, T]``, positive; ValueError when the values were not collected."""
        if inputs.values is None:
            raise ValueError("Scorer 'surrogate' needs values.")
        network = self._layers[inputs.layer]
        num_heads = len(inputs.keys)
        if network.mix.device != inputs.keys.device or len(network.mix) != num_heads:
            own = network.of_heads(self.settings.first_kv_head, num_heads)
            network = self._layers[inputs.layer] = own.to(inputs.keys.device)
        num_tokens, head_dim = inputs.keys.shape[1:]
        near = recency(num_tokens, inputs.keys.device)
        if inputs.positions is not None:
            near = _recency_at(inputs.positions[:, -1:] - inputs.positions)
        predicted = inputs.keys.new_empty(num_heads, num_tokens)
        width = network.mix.shape[2]
        for part in token_slices(inputs.keys, num_heads * (head_dim + 3 * width)):
            keys = inputs.unrotated_keys(part)
            predicted[:, part] = network.log_scores_of(
                keys, inputs.values[:, part], near[..., part, :]
            )
        predicted.clamp_(MIN_LOG_SCORE, 0.0)
        if power := contrast_power(inputs.keep_ratio):
            stands_out = contrast(inputs.unrotated_keys(), inputs.values)
            predicted.add_(stands_out.log_(), alpha=power)
        return predicted.exp_()


def _recency_at(distance: torch.Tensor) -> torch.Tensor:
    """As :func:`~vllm_kvzip.head_profiles.networks.recency`, of any pairs.

    Args:
        distance: int ``[H, T]``, tokens from the last one.

    Returns:
        float32 ``[H, T, 3]``.
    """
    return torch.stack([torch.exp(distance / -length) for length in RECENCY_TOKENS], dim=-1)
