"""What is taken off keys before they are quantized: their mean, and scales of outlier channels.

Many models add a constant to their keys. It decides the scale of a block and so drowns what tells
keys apart, though within one softmax it says nothing: it adds the same number to the logits of
all keys. So pages hold ``(key - mean) / scale``, and the constant comes back as one number for
each query and head, because

    query . key = (query * scale) . ((key - mean) / scale) + query . mean

The first tokens of a prompt, on which heads rest their attention, have keys that are small and
unlike all others; they would lose most by another's mean. So each of the first few has a mean of
its own, its key, and nothing of it is lost.

A rotary embedding turns a constant with the position, which leaves two channels of a head with a
mean of about zero and a spread far above that of the others. Such channels are divided by a scale
(as SmoothQuant, arXiv 2211.10438, does for activations). Scales are powers of two, so that neither
keys nor queries are rounded by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MOST_SPREAD = 4.0
"""Spread of a channel over the head's median that is left as it is; what is above it is scaled to
between half of it and all of it. At 4, two such channels of 64 add a quarter to the head's norm."""

MOST_FIRST = 4  # tokens

LARGEST_SCALE = 256.0
"""Queries are multiplied with a scale, and must stay finite in float16."""


def num_first(num_sinks: int) -> int:
    """W: how many of the first tokens have a mean of their own; every head must keep them."""
    return min(MOST_FIRST, num_sinks)


@dataclass(frozen=True)
class KeyTransform:
    """Of every head of a prefix; how its quantized pages hold keys.

    Attributes:
        mean: float32 ``[..., D]``, mean key of each head.
        scale: float32 ``[..., D]``, powers of two from 1 to :data:`LARGEST_SCALE`.
        first: float32 ``[..., W, D]``, what stands in the place of the mean for the first W tokens
            of a head's quantized tier: the keys of the prompt's first tokens where they lie there,
            else the mean.
    """

    mean: torch.Tensor
    scale: torch.Tensor
    first: torch.Tensor

    @classmethod
    def fit(cls, keys: torch.Tensor, num_sinks: int = 0) -> KeyTransform:
        """Of some heads.

        Args:
            keys: float32 ``[..., T, D]``, keys of each head.
            num_sinks: tokens at the start that are unlike the others and that every head keeps.
        """
        first = keys[..., : num_first(num_sinks), :]
        keys = keys[..., num_sinks:, :]
        num_tokens = max(1, keys.shape[-2])
        mean = keys.sum(dim=-2) / num_tokens
        spread = ((keys - mean[..., None, :]).square().sum(dim=-2) / num_tokens).sqrt()
        smallest = torch.finfo(torch.float32).tiny
        usual = spread.median(dim=-1, keepdim=True).values.clamp_min(smallest)
        excess = (spread / (MOST_SPREAD * usual)).clamp(1.0, LARGEST_SCALE)
        return cls(mean, excess.log2().ceil().exp2(), first)

    @classmethod
    def stack(cls, parts: list[KeyTransform]) -> KeyTransform:
        """Those of several layers, ``[L, H, D]``."""
        columns = zip(*((part.mean, part.scale, part.first) for part in parts), strict=True)
        return cls(*(torch.stack(column) for column in columns))

    @classmethod
    def join(cls, parts: list[KeyTransform]) -> KeyTransform:
        """Those of several requests, ``[L, H]`` each, as ``[L, R * H]``."""
        columns = zip(*((part.mean, part.scale, part.first) for part in parts), strict=True)
        return cls(*(torch.cat(column, dim=1) for column in columns))

    def at(self, index: int | torch.Tensor) -> KeyTransform:
        """Of some layers or heads; ``index`` goes into the first dimensions."""
        return KeyTransform(self.mean[index], self.scale[index], self.first[index])

    def where_first(self, quantized: torch.Tensor) -> KeyTransform:
        """With the mean for the first tokens of heads whose prompt's first tokens lie elsewhere.

        Args:
            quantized: bool ``[...]``, whether they are in a head's quantized tier.
        """
        first = torch.where(quantized[..., None, None], self.first, self.mean[..., None, :])
        return KeyTransform(self.mean, self.scale, first)

    @classmethod
    def fit_late(cls, keys: torch.Tensor, num_sinks: int) -> KeyTransform:
        """Of keys that do not begin with a prompt's first tokens, which are never quantized.

        Args:
            keys: float32 ``[..., T, D]``, keys of each head.
            num_sinks: tokens at the prompt's start that every head keeps.
        """
        fitted = cls.fit(keys)
        first = fitted.mean[..., None, :].expand(
            *fitted.mean.shape[:-1], num_first(num_sinks), fitted.mean.shape[-1]
        )
        return cls(fitted.mean, fitted.scale, first)

    def with_unchanged(self, num_layers: int) -> KeyTransform:
        """And that of layers after these, ``[L, H]``, whose keys it leaves as they are."""
        shape = (num_layers, *self.mean.shape[1:])
        zeros = self.mean.new_zeros(shape)
        first = self.first.new_zeros((num_layers, *self.first.shape[1:]))
        parts = ((self.mean, zeros), (self.scale, zeros + 1), (self.first, first))
        return KeyTransform(*(torch.cat(part) for part in parts))

    @property
    def flat(self) -> KeyTransform:
        """The first two dimensions as one: layers and heads as ``L * H`` heads."""
        return KeyTransform(*(t.flatten(0, 1) for t in (self.mean, self.scale, self.first)))

    @property
    def packed(self) -> torch.Tensor:
        """As kernels read it: mean, scale, and the first keys; float32 ``[..., 2 + W, D]``."""
        mean, scale = self.mean[..., None, :], self.scale[..., None, :]
        return torch.cat([mean, scale, self.first], dim=-2)

    def apply(self, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys as pages hold them, but for the rotation; zeros for the first tokens.

        Args:
            keys: float32 ``[..., T, D]``.
            positions: int64 ``[..., T]``, in the prompt; negative where there is no token, which
                gives zeros too.
        """
        return self.centred(keys).masked_fill_(positions[..., None] < self.first.shape[-2], 0.0)

    def centred(self, keys: torch.Tensor) -> torch.Tensor:
        """As :meth:`apply`, of tokens that are not a prompt's first ones."""
        return (keys - self.mean[..., None, :]) / self.scale[..., None, :]

    def undo(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys as they were: of a head's whole quantized tier, from its first token on.

        Args:
            keys: float32 ``[..., T, D]``, as pages hold them, but for the rotation.
        """
        keys = keys * self.scale[..., None, :] + self.mean[..., None, :]
        width = min(self.first.shape[-2], keys.shape[-2])
        keys[..., :width, :] += self.first[..., :width, :] - self.mean[..., None, :]
        return keys

    def first_shift(self) -> torch.Tensor:
        """What the first tokens of a tier have more than the mean, ``[..., W, D]``, as pages do."""
        return (self.first - self.mean[..., None, :]) / self.scale[..., None, :]

    def queries(self, queries: torch.Tensor) -> torch.Tensor:
        """Queries ``[..., M, D]`` for keys as pages hold them; float32."""
        return queries * self.scale[..., None, :]

    def offsets(self, queries: torch.Tensor) -> torch.Tensor:
        """What is added to the logits of quantized keys, before the softmax scale.

        Args:
            queries: float32 ``[..., M, D]``.

        Returns:
            float32 ``[..., M]``.
        """
        return (queries * self.mean[..., None, :]).sum(dim=-1)
