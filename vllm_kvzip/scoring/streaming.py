"""StreamingLLM: keep the sinks and the most recent tokens (arXiv 2309.17453)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.core import LayerInputs


@register_scorer
class StreamingScorer(Scorer):
    """The later a token, the higher; sinks are protected whatever the scorer says."""

    name: ClassVar[str] = "streaming"

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        num_heads, num_tokens, _ = inputs.keys.shape
        age = torch.linspace(0.0, 1.0, num_tokens, device=inputs.keys.device)
        return age.expand(num_heads, num_tokens).contiguous()
