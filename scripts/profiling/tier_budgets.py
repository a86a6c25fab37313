"""Budgets of two tiers for a head profile: what quantizing loses, and what follows from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_kvzip.budgeting.tier_solver import solve_tiers
from vllm_kvzip.head_profiles.head_profile import TierBudgets
from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.quantization import choose_quantization, unpack_pages

if TYPE_CHECKING:
    from collections.abc import Sequence

BYTES_RATIOS = (0.03, 0.05, 0.08, 0.125, 0.18, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
CACHE_BLOCK, CACHE_ITEM_BYTES = 16, 2  # of the KV cache that the budgets are made for
MOST_TOKENS = 512  # of each context that are quantized to see what that loses


class TierBudgetBuilder:
    """Gathers contexts.

    Args:
        num_layers, num_kv_heads, head_dim: L, H, D.
        keys, values: formats of the quantized tier.

    Raises:
        ValueError: if a format does not suit the head size.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        keys: str = "nf4",
        values: str = "nf4",
    ) -> None:
        self._formats = keys, values
        self._quantization = choose_quantization(
            page_bytes=2 * CACHE_BLOCK * head_dim * CACHE_ITEM_BYTES,
            head_dim=head_dim,
            keys=keys,
            values=values,
            rotation="auto",
        )
        shape = num_layers, num_kv_heads
        self._losses: list[float] = []
        self._full = {r: torch.zeros(shape, dtype=torch.float64) for r in BYTES_RATIOS}
        self._kept = {r: torch.zeros(shape, dtype=torch.float64) for r in BYTES_RATIOS}
        self._solved = 0

    @property
    def token_bytes(self) -> float:
        """Bytes of a quantized KV pair / of one as it is."""
        return CACHE_BLOCK / self._quantization.head_page_tokens

    def watch(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """See what quantizing a context's keys and values loses.

        Keys without what they are freed of before: a constant part loses nothing.

        Args:
            layers: keys and values of each layer after the prefill, ``[H, T, D]``.
        """
        page_tokens = self._quantization.layout.page_tokens
        for layer in layers:
            keys, values = (half[:, :MOST_TOKENS].float() for half in layer)
            whole = keys.shape[1] // page_tokens * page_tokens
            if not whole:
                continue
            keys = KeyTransform.fit(keys).apply(keys, torch.arange(keys.shape[1]))
            shape = (-1, page_tokens, keys.shape[2])
            rows = [half[:, :whole].reshape(shape) for half in (keys, values)]
            found = unpack_pages(self._quantization.pack(*rows), self._quantization.layout)
            for before, after in zip(rows, found, strict=True):
                back = self._quantization.turn_back(after)
                self._losses.append(float((back.view_as(before) - before).norm() / before.norm()))

    @property
    def loss(self) -> float:
        """Norm of what quantizing changes over the norm, mean of keys and values of all layers.

        From 0.001 to 0.99: a profile cannot say that nothing or everything is lost.
        """
        mean = sum(self._losses) / len(self._losses) if self._losses else 0.1
        return min(max(mean, 1e-3), 0.99)

    def solve(self, scores: torch.Tensor) -> None:
        """Take in the budgets of one context.

        Args:
            scores: ``[L, H, T]``.
        """
        self._solved += 1
        loss = self.loss
        for ratio in BYTES_RATIOS:
            full, kept = solve_tiers(scores, ratio, self.token_bytes, loss)
            self._full[ratio] += full
            self._kept[ratio] += kept

    def result(self) -> TierBudgets:
        """Means over the contexts."""
        grids = [
            {str(ratio): (grid / self._solved).clamp(0, 1).tolist() for ratio, grid in by.items()}
            for by in (self._full, self._kept)
        ]
        return TierBudgets(
            key_format=self._formats[0],
            value_format=self._formats[1],
            token_bytes=round(self.token_bytes, 4),
            loss=round(self.loss, 4),
            full=grids[0],
            kept=grids[1],
        )
