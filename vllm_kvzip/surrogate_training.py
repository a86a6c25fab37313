"""Train the networks of scorer ``surrogate`` on a model's own reconstruction scores.

One small network per layer learns, by least squares, the
log of the score that each KV head's pair got (see :mod:`vllm_kvzip.surrogate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.surrogate import MIN_LOG_SCORE, LayerSurrogate, token_features

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vllm_kvzip.rotary import RotaryTables

    Cached = Iterable[tuple[torch.Tensor, torch.Tensor]]

STEPS = 1500
BATCH_TOKENS = 512
LEARNING_RATE = 3e-3


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

    def add(self, cache: Cached, scores: torch.Tensor, rotary: RotaryTables | None) -> None:
        """Take in one context.

        Args:
            cache: each layer's keys and values after the prefill, ``[H, T, D]``.
            scores: float32 ``[L, H, T]``, its reconstruction scores.
            rotary: of the model.
        """
        chosen = torch.randperm(scores.shape[-1], generator=self._generator)
        chosen = chosen[: self._tokens_per_context]
        targets = scores.log().clamp(MIN_LOG_SCORE, 0.0)
        for index, (keys, values) in enumerate(cache):
            features = token_features(keys.float(), values.float(), rotary)
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
            (torch.randn(shape, generator=self._generator) * num_inputs**-0.5).to(features.device)
            for shape in shapes
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
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        mix, mix_bias, out, out_bias = (parameter.detach() for parameter in parameters)
        mix = mix / spread[:, None]  # so that the network reads plain keys and values
        return LayerSurrogate(mix, mix_bias - mean @ mix, out, out_bias)


def agreement(
    layers: Sequence[LayerSurrogate],
    cache: Cached,
    scores: torch.Tensor,
    rotary: RotaryTables | None,
    keep_ratio: float,
) -> float:
    """Share of the best KV pairs of one context, over all layers and heads, that are chosen.

    Args:
        layers: the networks.
        cache: each layer's keys and values after the prefill, ``[H, T, D]``.
        scores: float32 ``[L, H, T]``, reconstruction scores.
        rotary: of the model.
        keep_ratio: how many pairs are the best.
    """
    predicted = torch.stack(
        [
            network.log_scores_of(keys.float(), values.float(), rotary).t()
            for network, (keys, values) in zip(layers, cache, strict=True)
        ]
    )
    count = max(1, round(keep_ratio * scores.numel()))
    best = scores.flatten().topk(count).indices
    chosen = predicted.flatten().topk(count).indices
    return float(torch.isin(chosen, best).float().mean())
