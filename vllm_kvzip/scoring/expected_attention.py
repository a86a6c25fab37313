"""Expected attention: what future queries will look at, if they are like the last ones.

arXiv 2510.00636. The queries before rotation are taken to be normally distributed; their mean and
covariance, rotated to the positions that come next, give the expected attention to each key in
closed form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.config import Budget
    from vllm_kvzip.core import LayerInputs

FUTURE_TOKENS = 512


@register_scorer
class ExpectedAttentionScorer(Scorer):
    """Expected attention times the norm of the value, mean over the query group.

    The paper estimates the queries' distribution from the whole context; here it comes from the
    context's last tokens, whose queries are kept during prefill. Softmax runs over the prefix, so
    what a score means differs from head to head: every head gets the same budget.
    """

    name: ClassVar[str] = "expected-attention"
    default_budget: ClassVar[Budget | None] = "uniform"
    needs_values: ClassVar[bool] = True
    min_observation_tokens: ClassVar[int] = 128
    needs_observation_queries: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when queries or values were not collected."""
        queries, values, rotary = inputs.observation_queries, inputs.values, inputs.rotary
        if queries is None or values is None:
            raise ValueError("Scorer 'expected-attention' needs values and the last queries.")
        queries = queries.permute(1, 2, 0, 3)  # [H, G, W, D]
        end = inputs.num_context_tokens
        if rotary is not None:
            positions = torch.arange(end - queries.shape[2], end, device=queries.device)
            queries = rotary.unrotate(queries, positions)
        mean = queries.mean(dim=2)
        centred = queries - mean[:, :, None]
        covariance = centred.transpose(2, 3) @ centred / queries.shape[2]  # [H, G, D, D]
        if rotary is not None:
            mean = rotary.rotate_to_mean(mean, end, FUTURE_TOKENS)
            covariance = rotary.rotate_to_mean(covariance, end, FUTURE_TOKENS).transpose(2, 3)
            covariance = rotary.rotate_to_mean(covariance, end, FUTURE_TOKENS)
        keys = inputs.keys[:, None] * inputs.scale  # [H, 1, T, D]
        logits = (keys @ mean[..., None]).squeeze(-1)
        logits = logits + 0.5 * ((keys @ covariance) * keys).sum(-1)  # [H, G, T]
        norms: torch.Tensor = values.norm(dim=-1)
        return logits.softmax(dim=-1).mean(dim=1) * norms
