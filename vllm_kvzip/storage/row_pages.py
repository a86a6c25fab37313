"""Head pages whose rows are tokens, key and value side by side, as vLLM's GPU kernels want it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_kvzip.kernels.page_copies import compact_pages
from vllm_kvzip.kernels.quantized_pages import quantize_pages
from vllm_kvzip.storage.stored_scales import KEYS, VALUES

if TYPE_CHECKING:
    from vllm_kvzip.core import KeepPlan
    from vllm_kvzip.model.key_transform import KeyTransform
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.storage.stored_scales import StoredScales


PAGES_AT_ONCE = 1024
"""Quantized pages that are filled by one launch; bounds what lies in float32 beside the cache."""


class RowPages:
    """A ``PageStore`` over such a pool; nothing waits for the device.

    Args:
        pages: ``[num_pages, N * 2 * D]``, the pool; written in place.
        page_tokens: N.
        head_dim: D.
        quantization: how :meth:`quantize` writes pages; None where it is never called.
        scales: of a pool of 8-bit numbers; None where numbers are stored as they are.
    """

    def __init__(
        self,
        pages: torch.Tensor,
        page_tokens: int,
        head_dim: int,
        quantization: Quantization | None = None,
        scales: StoredScales | None = None,
    ) -> None:
        self.device = pages.device
        self._quantized = None if quantization is None else quantization.pages_of(pages)
        self._quantization = quantization
        code_book = quantization.code_book if quantization else None
        self._code_book = None if code_book is None else code_book.to(self.device)
        self._scales = scales
        rows = pages.view(len(pages), page_tokens, 2, head_dim)
        self._keys, self._values = rows[:, :, 0], rows[:, :, 1]

    def views(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all pages as they are stored, ``[num_pages, N, D]``, no copy."""
        if self._scales is None:
            return self._keys, self._values
        return self._keys.view(self._scales.stored), self._values.view(self._scales.stored)

    def read_keys(self, page_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """See :class:`~vllm_kvzip.storage.page_store.PageStore`."""
        return self._read(self._keys, page_ids, layer, KEYS)

    def read_values(self, page_ids: torch.Tensor, layer: int) -> torch.Tensor:
        """See :class:`~vllm_kvzip.storage.page_store.PageStore`."""
        return self._read(self._values, page_ids, layer, VALUES)

    def _read(
        self, half: torch.Tensor, page_ids: torch.Tensor, layer: int, which: int
    ) -> torch.Tensor:
        stored = half[page_ids].flatten(1, 2)
        if self._scales is None:
            return stored
        return self._scales.multiply(stored, self._scales.factors[which, layer][:, None])

    def compact(self, sources: torch.Tensor, keep: KeepPlan, targets: torch.Tensor) -> None:
        """See ``PageStore.compact``; one launch for all layers."""
        by_head = sources.flatten(0, 1).to(torch.int32)
        heads = torch.arange(len(by_head), dtype=torch.int32, device=self.device)
        compact_pages(
            self._keys,
            self._values,
            by_head,
            keep.positions.flatten().to(torch.int32),
            heads.repeat_interleave(keep.pages.flatten(), output_size=len(targets)),
            targets.to(torch.int32),
        )

    def quantize(
        self,
        sources: torch.Tensor,
        keep: KeepPlan,
        targets: torch.Tensor,
        transform: KeyTransform,
    ) -> torch.Tensor:
        """See :meth:`~vllm_kvzip.storage.page_store.PageStore.quantize`; some pages at a time."""
        assert self._quantization is not None and self._quantized is not None
        layout, turn = self._quantization.layout, self._quantization.turn
        targets = self._quantization.page_ids(targets)
        transforms = transform.flat
        by_head = sources.flatten(0, 1)
        heads = torch.arange(len(by_head), device=self.device)
        heads = heads.repeat_interleave(keep.pages.flatten(), output_size=len(targets))
        page_tokens = self._keys.shape[1]
        for first in range(0, len(targets), PAGES_AT_ONCE):
            part = slice(first, first + PAGES_AT_ONCE)
            positions = keep.positions[part]
            index = positions.clamp(min=0)
            pages = by_head[heads[part, None], index // page_tokens]
            keys, values = (
                self._rows(half, which, pages, index, heads[part])
                for half, which in ((self._keys, KEYS), (self._values, VALUES))
            )
            keys = transforms.at(heads[part]).apply(keys.float(), positions)
            keys, values = (turn(half.flatten(0, 1)) for half in (keys, values))
            rows = torch.arange(positions.numel(), device=self.device).view_as(positions)
            rows = torch.where(positions < 0, -1, rows)
            quantize_pages(
                keys, values, rows, self._quantized, targets[part], layout, self._code_book
            )
        return targets

    def _rows(
        self,
        half: torch.Tensor,
        which: int,
        pages: torch.Tensor,
        index: torch.Tensor,
        heads: torch.Tensor,
    ) -> torch.Tensor:
        """Tokens ``[n, Q]`` of some heads, ``[n, Q, D]``."""
        rows = half[pages, index % self._keys.shape[1]]
        if self._scales is not None:
            factors = self._scales.factors[which].flatten()[heads]
            rows = self._scales.multiply(rows, factors[:, None])
        return rows
