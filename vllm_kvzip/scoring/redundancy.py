"""What the last tokens look at, unless it is said again later (after R-KV, arXiv 2505.24133)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch.nn.functional import normalize

from vllm_kvzip.model.slices import token_slices
from vllm_kvzip.scoring.base import Scorer, register_scorer
from vllm_kvzip.scoring.observed import pooled_attention

if TYPE_CHECKING:
    from vllm_kvzip.config import Budget
    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class RedundancyScorer(Scorer):
    """Attention of the observation window, times the value's norm, times what is new in the key.

    What is new in a key is one minus its highest cosine similarity to a later key of its head, both
    without their rotation. So of a passage that is written twice the first copy goes and the last
    one stays. R-KV subtracts a softmax over the head's pairs from another one, which means
    something else in each head; a product means the same everywhere, so it suits budget
    ``adaptive``. The norm of the value weighs what attention brings back. Needs no profile.
    """

    name: ClassVar[str] = "redundancy"
    default_budget: ClassVar[Budget | None] = "adaptive"
    needs_values: ClassVar[bool] = True
    needs_observation_queries: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    rescores_kept: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``, not negative; ValueError when queries or values are missing."""
        if inputs.observation_queries is None or inputs.values is None:
            raise ValueError("Scorer 'redundancy' needs values and the queries of the last tokens.")
        scores = novelty(inputs.unrotated_keys())
        scores *= inputs.values.norm(dim=-1)
        return scores.mul_(pooled_attention(inputs, inputs.observation_queries))


def novelty(keys: torch.Tensor) -> torch.Tensor:
    """One minus each key's highest cosine similarity to a later one of its head, in [0, 1].

    All similarities are T times T numbers a head; a slice of them exists at once.

    Args:
        keys: float32 ``[H, T, D]``, in the order of their positions; pads are zero, and like
            nothing.

    Returns:
        float32 ``[H, T]``.
    """
    keys = normalize(keys, dim=-1)
    num_heads, num_tokens, _ = keys.shape
    highest = torch.zeros_like(keys[..., 0])
    for part in token_slices(keys, 2 * num_heads * num_tokens):
        likeness = keys[:, part] @ keys[:, part.start :].transpose(1, 2)
        likeness.triu_(diagonal=1)  # those before it, and itself, count as unlike
        highest[:, part] = likeness.amax(dim=2)
    return highest.clamp_(0.0, 1.0).neg_().add_(1.0)
