"""Expected attention: what future queries will look at, if they are like the last ones.

arXiv 2510.00636. The queries before rotation are taken to be normally distributed; their mean and
covariance, rotated to the positions that come next, give the expected attention to each key in
closed form.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_kvzip.model.slices import group_slices, token_slices
from vllm_kvzip.scoring.base import Scorer, register_scorer

if TYPE_CHECKING:
    from vllm_kvzip.config import Budget
    from vllm_kvzip.layer_inputs import LayerInputs

FUTURE_TOKENS = 512


@register_scorer
class ExpectedAttentionScorer(Scorer):
    """Expected attention times the norm of the value, mean over the query group.

    The paper estimates the queries' distribution from the whole context; here it comes from the
    context's last tokens, whose queries are kept during prefill. Softmax runs over the prefix, or
    in rounds over what is left of it and what is new, so what a score means differs from head to
    head: every head gets the same budget.
    """

    name: ClassVar[str] = "expected-attention"
    default_budget: ClassVar[Budget | None] = "uniform"
    needs_values: ClassVar[bool] = True
    min_observation_tokens: ClassVar[int] = 128
    needs_observation_queries: ClassVar[bool] = True
    needs_rotary: ClassVar[bool] = True
    rescores_kept: ClassVar[bool] = True
    takes_capped_logits: ClassVar[bool] = False  # no closed form is known for them

    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Float32 ``[H, T]``; ValueError when queries or values were not collected."""
        queries, values = inputs.observation_queries, inputs.values
        if queries is None or values is None:
            raise ValueError("Scorer 'expected-attention' needs values and the last queries.")
        keys = inputs.keys
        window, _, group_size, head_dim = queries.shape
        scores = torch.zeros_like(values[..., 0])
        of_member = keys.shape[1] + 2 * window * head_dim + 4 * head_dim**2
        for part in group_slices(keys, group_size, len(keys) * of_member):
            mean, covariance = _moments(queries[:, :, part], inputs)
            attention = _logits(keys, mean, covariance)
            if inputs.real is not None:
                attention.masked_fill_(~inputs.real[:, None], float("-inf"))
            sinks = None if inputs.sink_logits is None else inputs.sink_logits[:, part, None]
            scores += _softmax_(attention, sinks).sum(dim=1)
        norms: torch.Tensor = values.norm(dim=-1)
        return scores.mul_(norms).div_(group_size)


def _moments(queries: torch.Tensor, inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ``[H, G, D]`` and covariance ``[H, G, D, D]`` of later queries, with the softmax scale.

    Args:
        queries: float32 ``[W, H, G, D]``, the last ones.
        inputs: of the layer.
    """
    rotary, end = inputs.rotary, inputs.num_context_tokens
    queries = queries.permute(1, 2, 0, 3)  # [H, G, W, D]
    window = queries.shape[2]
    if rotary is not None:
        positions = torch.arange(end - window, end, device=queries.device)
        queries = rotary.unrotate(queries, positions)
    mean = queries.mean(dim=2)
    centred = queries - mean[:, :, None]
    del queries
    covariance = (centred.transpose(2, 3) @ centred).mul_(inputs.scale**2 / window)
    del centred
    if rotary is not None:
        mean = rotary.rotate_to_mean(mean, end, FUTURE_TOKENS)
        covariance = rotary.rotate_to_mean(covariance, end, FUTURE_TOKENS).transpose(2, 3)
        covariance = rotary.rotate_to_mean(covariance, end, FUTURE_TOKENS)
    return mean * inputs.scale, covariance


def _softmax_(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax of ``[H, G, T]`` in its place; ``sinks`` ``[H, G, 1]`` join it and have no weight."""
    highest = logits.amax(dim=-1, keepdim=True)
    if sinks is not None:
        highest = highest.maximum(sinks)
    weights = logits.sub_(highest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total += (sinks - highest).exp()
    return weights.div_(total)


def _logits(keys: torch.Tensor, mean: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Log of the expected exponential of a query's product with each key, up to a constant.

    Args:
        keys: float32 ``[H, T, D]``.
        mean: float32 ``[H, G, D]``, of the queries.
        covariance: float32 ``[H, G, D, D]``, likewise.

    Returns:
        float32 ``[H, G, T]``.
    """
    num_heads, group_size, head_dim = mean.shape
    logits = keys.new_empty(num_heads, group_size, keys.shape[1])
    covariance = covariance.transpose(1, 2).flatten(2)  # [H, D, G * D]: all of a group at once
    mean = mean.transpose(1, 2)
    for part in token_slices(keys, num_heads * group_size * (head_dim + 3)):
        tokens = keys[:, part]
        spread = (tokens @ covariance).view(num_heads, -1, group_size, head_dim)
        variance = spread.mul_(tokens[:, :, None]).sum(dim=-1)  # [H, S, G]
        logits[:, :, part] = variance.mul_(0.5).add_(tokens @ mean).transpose(1, 2)
    return logits
