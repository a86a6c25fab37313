"""Train the networks of scorer ``surrogate`` on a model's own reconstruction scores.

Used by ``profile_heads.py --surrogate``. One small network per layer learns, by least squares, the
log of the score that each KV head's pair got (see :mod:`vllm_kvzip.surrogate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.rotary import RotaryTables
from vllm_kvzip.surrogate import MIN_LOG_SCORE, LayerSurrogate, token_features

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 1500
BATCH_TOKENS = 512
LEARNING_RATE = 3e-3


def rotary_of(model: Any, num_tokens: int) -> RotaryTables | None:
    """The rotary angles of a transformers model, for its first positions; None if it has none."""
    embedding = getattr(model.get_decoder(), "rotary_emb", None)
    if embedding is None:
        return None
    cos, sin = embedding(torch.zeros(1), torch.arange(num_tokens)[None])
    cos, sin = cos[0].float(), sin[0].float()  # [T, R], every angle twice
    half = cos.shape[-1] // 2
    if torch.equal(cos[:, :half], cos[:, half:]):
        return RotaryTables(cos[:, :half], sin[:, :half])
    return RotaryTables(cos[:, ::2], sin[:, ::2], interleaved=True)


class SurrogateTrainer:
    """Collects tokens of some contexts, then fits one network per layer.

    Args:
        num_layers: of the model.
        tokens_per_context: how many tokens of each context are kept, drawn at random; their
            features wait in memory until the networks are fitted.
        width: of the networks.
        seed: of the drawing and of the fit.
    """

    def __init__(self, num_layers: int, tokens_per_context: int, width: int, seed: int) -> None:
        self._features: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._targets: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._tokens_per_context = tokens_per_context
        self._width = width
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, cache: Any, scores: torch.Tensor, rotary: RotaryTables | None) -> None:
        """Take in one context.

        Args:
            cache: transformers' cache after the prefill.
            scores: float32 ``[L, H, T]``, its reconstruction scores.
            rotary: of the model.
        """
        chosen = torch.randperm(scores.shape[-1], generator=self._generator)
        chosen = chosen[: self._tokens_per_context]
        targets = scores.log().clamp(MIN_LOG_SCORE, 0.0)
        for index, layer in enumerate(cache.layers):
            features = token_features(layer.keys[0].float(), layer.values[0].float(), rotary)
            self._features[index].append(features[chosen].half())
            self._targets[index].append(targets[index, :, chosen].t())

    def fit(self, progress: Callable[[], Any] = lambda: None) -> list[LayerSurrogate]:
        """Fit all layers.

        Args:
            progress: called after each layer.
        """
        layers = []
        for features, targets in zip(self._features, self._targets, strict=True):
            layers.append(self._fit_layer(torch.cat(features).float(), torch.cat(targets)))
            progress()
        return layers

    def _fit_layer(self, features: torch.Tensor, targets: torch.Tensor) -> LayerSurrogate:
        mean, spread = features.mean(0), features.std(0) + 1e-6
        features = (features - mean) / spread
        num_inputs, num_heads = features.shape[1], targets.shape[1]
        shapes = [(num_inputs, self._width), (self._width,), (self._width, num_heads)]
        mix, mix_bias, out = (
            torch.randn(shape, generator=self._generator) * num_inputs**-0.5 for shape in shapes
        )
        parameters = [mix, mix_bias, out, targets.mean(0)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(len(features), (BATCH_TOKENS,), generator=self._generator)
            predicted = LayerSurrogate(*parameters).log_scores(features[rows])
            loss = torch.nn.functional.mse_loss(predicted, targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        mix, mix_bias, out, out_bias = (parameter.detach() for parameter in parameters)
        mix = mix / spread[:, None]  # so that the network reads plain keys and values
        return LayerSurrogate(mix, mix_bias - mean @ mix, out, out_bias)


def agreement(
    layers: list[LayerSurrogate],
    cache: Any,
    scores: torch.Tensor,
    rotary: RotaryTables | None,
    keep_ratio: float,
) -> float:
    """Share of the best KV pairs of one context, over all layers and heads, that are chosen.

    Args:
        layers: the networks.
        cache: transformers' cache after the prefill.
        scores: float32 ``[L, H, T]``, reconstruction scores.
        rotary: of the model.
        keep_ratio: how many pairs are the best.
    """
    predicted = torch.stack(
        [
            network.log_scores_of(part.keys[0], part.values[0], rotary).t()
            for network, part in zip(layers, cache.layers, strict=True)
        ]
    )
    count = max(1, round(keep_ratio * scores.numel()))
    best = scores.flatten().topk(count).indices
    chosen = predicted.flatten().topk(count).indices
    return float(torch.isin(chosen, best).float().mean())
