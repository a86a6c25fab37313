"""StreamingLLM: keep the sinks and the most recent tokens (arXiv 2309.17453)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.layer_inputs import LayerInputs


@register_scorer
class StreamingScorer(Scorer):
    """The later a token, the higher; sinks are protected whatever the scorer says."""

    name: ClassVar[str] = "streaming"
    comparable_across_parts: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        num_heads, num_tokens, _ = inputs.keys.shape
        positions = inputs.first_position + torch.arange(num_tokens, device=inputs.keys.device)
        return positions.float().expand(num_heads, num_tokens).contiguous()
