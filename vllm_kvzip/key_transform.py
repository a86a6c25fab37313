"""What is taken off keys before they are quantized: their mean, and scales of outlier channels.

Many models add a constant to their keys. It decides the scale of a block and so drowns what tells
keys apart, though within one softmax it says nothing: it adds the same number to the logits of
all keys. So pages hold ``(key - mean) / scale``, and the constant comes back as one number for
each query and head, because

    query . key = (query * scale) . ((key - mean) / scale) + query . mean

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

LARGEST_SCALE = 256.0
"""Queries are multiplied with a scale, and must stay finite in float16."""


@dataclass(frozen=True)
class KeyTransform:
    """Of every head of a prefix; how its quantized pages hold keys.

    Attributes:
        mean: float32 ``[..., D]``, mean key of each head.
        scale: float32 ``[..., D]``, powers of two from 1 to :data:`LARGEST_SCALE`.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def fit(cls, keys: torch.Tensor) -> KeyTransform:
        """Of some heads.

        Args:
            keys: float32 ``[..., T, D]``, typical keys of each head; T may be 0.
        """
        num_tokens = max(1, keys.shape[-2])
        mean = keys.sum(dim=-2) / num_tokens
        spread = ((keys - mean[..., None, :]).square().sum(dim=-2) / num_tokens).sqrt()
        smallest = torch.finfo(torch.float32).tiny
        usual = spread.median(dim=-1, keepdim=True).values.clamp_min(smallest)
        excess = (spread / (MOST_SPREAD * usual)).clamp(1.0, LARGEST_SCALE)
        return cls(mean, excess.log2().ceil().exp2())

    @classmethod
    def stack(cls, parts: list[KeyTransform]) -> KeyTransform:
        """Those of several layers, ``[L, H, D]``."""
        means, scales = [part.mean for part in parts], [part.scale for part in parts]
        return cls(torch.stack(means), torch.stack(scales))

    def at(self, index: int | torch.Tensor) -> KeyTransform:
        """Of some layers or heads; ``index`` goes into the first dimensions."""
        return KeyTransform(self.mean[index], self.scale[index])

    def apply(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys ``[..., T, D]`` as pages hold them, but for the rotation; float32."""
        return (keys - self.mean[..., None, :]) / self.scale[..., None, :]

    def undo(self, keys: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`apply`."""
        return keys * self.scale[..., None, :] + self.mean[..., None, :]

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
