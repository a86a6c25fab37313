"""How much a key stands out from its head's other keys, and how much its value carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import normalize

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.config import Budget
    from vllm_kvzip.layer_inputs import LayerInputs

SMALLEST = 1e-6  # a score's logarithm is taken where scores are combined
MOST_POWER = 0.5  # of the value's norm, where little is kept
POWER_FROM, POWER_FULLY = 0.5, 0.25  # keep ratios between which it comes in


def contrast(keys: torch.Tensor, values: torch.Tensor, power: float = MOST_POWER) -> torch.Tensor:
    """Distance of each key from its head's mean direction, times a power of its value's norm.

    Args:
        keys: float32 ``[H, T, D]``, without their rotation.
        values: float32 ``[H, T, D]``.
        power: of the norm.

    Returns:
        float32 ``[H, T]``, positive.
    """
    keys = normalize(keys, dim=-1)
    anchor = normalize(keys.mean(dim=1), dim=-1)
    distance = 1.0 - torch.bmm(keys, anchor[..., None]).squeeze(-1)
    weight: torch.Tensor = values.norm(dim=-1).pow_(power)
    return distance.mul_(weight).clamp_(min=SMALLEST)


def value_power(keep_ratio: float) -> float:
    """How much the value's norm counts: nothing where half is kept, its root from a quarter on."""
    return MOST_POWER * ramp(keep_ratio, POWER_FROM, POWER_FULLY)


def ramp(keep_ratio: float, start: float, full: float) -> float:
    """0 from keep ratio ``start`` on, 1 from the smaller ``full`` down, linear between them."""
    return min(max((start - keep_ratio) / (start - full), 0.0), 1.0)


@register_scorer
class ContrastScorer(Scorer):
    """KeyDiff's distance (arXiv 2504.15364, eq. 3) of keys without their rotation, and the value.

    Rotation turns equal keys into different ones, so the distance of rotated keys says as much of
    positions as of tokens. Taken off first, what stands out is what the token said. The norm of
    the value weighs how much attending to it can change; that matters most where little is kept.
    Needs neither queries, nor a forward pass, nor training.
    """

    name: ClassVar[str] = "contrast"
    comparable_across_parts: ClassVar[bool] = True
    default_budget: ClassVar[Budget | None] = "adaptive"
    needs_values: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when the values were not collected."""
        if inputs.values is None:
            raise ValueError("Scorer 'contrast' needs values.")
        power = value_power(inputs.keep_ratio)
        return contrast(inputs.unrotated_keys(), inputs.values, power)
