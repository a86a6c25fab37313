"""Train the networks of scorer ``surrogate`` on scores of a model's own KV pairs.

One small network per KV head (``networks.py``) learns, by least squares, the log of the score that
the head's pairs got. The scores are those of ``influence.py`` where the model can be
differentiated, and else KVzip's. Where there are scores of several kinds, one network can learn
what they say together. The heads of a layer are fitted side by side.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.head_profiles.networks import LayerSurrogate, token_features
from vllm_kvzip.model.rotary import unrotated

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from vllm_kvzip.model.rotary import RotaryTables

    Cached = Iterable[tuple[torch.Tensor, torch.Tensor]]

STEPS = 400
BATCH_TOKENS = 512
ATTENTION_FLOOR = -6.0  # an attention of 0.0025
BEST_SHARE = 1e-3  # scores above that of this share of all pairs count alike
LEARNING_RATE = 6e-3
ONE = MappingProxyType({0: 1.0})  # the first kind of scores alone


class SurrogateTrainer:
    """Collects tokens of some contexts, then fits one network per KV head.

    Args:
        num_layers: of the model.
        tokens_per_context: how many tokens of each context are kept, drawn at random; their
            features wait in memory until the networks are fitted.
        width: of the networks.
        seed: of the drawing and of the fit.
        floors: one for each kind of score that networks can be fitted to; log scores below it,
            beside the best ones, count alike.
    """

    def __init__(
        self,
        num_layers: int,
        tokens_per_context: int,
        width: int,
        seed: int,
        floors: Sequence[float] = (ATTENTION_FLOOR,),
    ) -> None:
        self._features: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self._targets: list[list[list[torch.Tensor]]] = [
            [[] for _ in range(num_layers)] for _ in floors
        ]
        self._tokens_per_context = tokens_per_context
        self._width = width
        self._floors = floors
        self._generator = torch.Generator().manual_seed(seed)

    def add(
        self, cache: Cached, scores: Sequence[torch.Tensor], rotary: RotaryTables | None
    ) -> None:
        """Take in one context.

        Args:
            cache: each layer's keys and values after the prefill, ``[H, T, D]``.
            scores: of each kind float32 ``[L, H, T]``, not negative, in one unit for all contexts.
            rotary: of the model.
        """
        chosen = torch.randperm(scores[0].shape[-1], generator=self._generator)
        chosen = chosen[: self._tokens_per_context]
        for index, (keys, values) in enumerate(cache):
            features = token_features(unrotated(keys.float(), rotary), values.float())
            self._features[index].append(features[:, chosen].half())
            for targets, kind in zip(self._targets, scores, strict=True):
                targets[index].append(kind[index][:, chosen].log())

    def fit(
        self, progress: Callable[[], Any] = lambda: None, shares: Mapping[int, float] = ONE
    ) -> list[LayerSurrogate]:
        """Fit all layers to scores of some kinds; the same networks however often it is called.

        Args:
            progress: called after each layer.
            shares: how much each kind of scores counts. Of several, the root of the sum of their
                squares is learned, each in a unit in which its mean square over all pairs is its
                share.
        """
        layers = []
        generator = self._generator.clone_state()
        floor = self._floors[next(iter(shares))]
        targets = self._log_scores(shares)
        best = _best(targets)
        for features, log_scores in zip(self._features, targets, strict=True):
            log_scores = (log_scores - best).clamp_(floor, 0.0)
            layers.append(self._fit_layer(torch.cat(features, 1).float(), log_scores, generator))
            progress()
        return layers

    def _log_scores(self, shares: Mapping[int, float]) -> list[torch.Tensor]:
        """What is learned, before its best becomes 0: of each layer ``[H, n]``."""
        layers = [[torch.cat(parts, 1) for parts in self._targets[kind]] for kind in shares]
        if len(shares) == 1:
            return layers[0]
        means = [torch.stack([part.mul(2).exp().mean() for part in kind]).mean() for kind in layers]
        units = [
            0.5 * (mean / share).log() for mean, share in zip(means, shares.values(), strict=True)
        ]
        return [
            0.5
            * torch.stack(
                [2 * (part - unit) for part, unit in zip(parts, units, strict=True)]
            ).logsumexp(dim=0)
            for parts in zip(*layers, strict=True)
        ]

    def _fit_layer(
        self, features: torch.Tensor, targets: torch.Tensor, generator: torch.Generator
    ) -> LayerSurrogate:
        """Networks for features ``[H, n, F]`` and log scores ``[H, n]``."""
        mean, spread = features.mean(1), features.std(1) + 1e-6
        features = (features - mean[:, None]) / spread[:, None]
        num_heads, num_tokens, num_inputs = features.shape

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(features.device)

        mix = random(num_heads, num_inputs, self._width) * num_inputs**-0.5
        mix_bias = random(num_heads, self._width) * num_inputs**-0.5
        out = random(num_heads, self._width) * self._width**-0.5
        parameters = [mix, mix_bias, out, targets.mean(1)]
        for parameter in parameters:
            parameter.requires_grad_(True)
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        for _ in range(STEPS):
            rows = torch.randint(num_tokens, (BATCH_TOKENS,), generator=generator)
            rows = rows.to(features.device)
            predicted = LayerSurrogate(*parameters).log_scores(features[:, rows])
            # Heads do not share weights, so each learns as if it were alone.
            loss = (predicted - targets[:, rows]).square().mean(dim=1).sum()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        mix, mix_bias, out, out_bias = (parameter.detach() for parameter in parameters)
        mix = mix / spread[..., None]  # so that the network reads plain keys and values
        mix_bias = mix_bias - torch.bmm(mean[:, None], mix).squeeze(1)
        return LayerSurrogate(mix, mix_bias, out, out_bias)


def _best(layers: Sequence[torch.Tensor]) -> float:
    """The log score that becomes 0."""
    all_scores = torch.cat([layer.flatten() for layer in layers])
    count = max(1, round(BEST_SHARE * all_scores.numel()))
    return float(all_scores.topk(count).values[-1])


def predict(
    layers: Sequence[LayerSurrogate], cache: Cached, rotary: RotaryTables | None
) -> torch.Tensor:
    """What the networks predict of one context, log scores float32 ``[L, H, T]``.

    Args:
        layers: the networks.
        cache: each layer's keys and values after the prefill, ``[H, T, D]``.
        rotary: of the model.
    """
    return torch.stack(
        [
            network.log_scores_of(unrotated(keys.float(), rotary), values.float())
            for network, (keys, values) in zip(layers, cache, strict=True)
        ]
    )
