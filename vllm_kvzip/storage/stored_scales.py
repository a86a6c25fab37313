"""Caches of 8-bit numbers: what is stored is multiplied with a scale when it is used.

``--kv-cache-dtype fp8`` stores keys and values as floating-point numbers of 8 bits (E4M3 of
Micikevicius et al., https://arxiv.org/abs/2209.05433), divided by a scale of their layer or head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

QUERIES, KEYS, VALUES = range(3)
"""Rows of :attr:`StoredScales.factors`."""


@dataclass(frozen=True)
class StoredScales:
    """Scales of one cache.

    Attributes:
        stored: dtype of what is stored, one byte.
        dtype: of the model.
        query_dtype: of queries as attention gets them: ``stored`` where vLLM quantizes them too.
        factors: float32 ``[3, L, H]``, of queries, keys and values.
    """

    stored: torch.dtype
    dtype: torch.dtype
    query_dtype: torch.dtype
    factors: torch.Tensor

    def multiply(self, numbers: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        """What is stored, as numbers of the model.

        Args:
            numbers: ``[..., D]``, of one byte each.
            factors: float32 that broadcasts to ``[...]``.
        """
        return (numbers.view(self.stored).float() * factors[..., None]).to(self.dtype)
