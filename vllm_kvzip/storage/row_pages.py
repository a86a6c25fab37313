"""Head pages whose rows are tokens, key and value side by side, as vLLM's GPU kernels want it."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.kernels.page_copies import compact_pages
from vllm_kvzip.kernels.quantized_pages import dequantize_pages, quantize_pages
from vllm_kvzip.storage.stored_scales import KEYS, VALUES

if TYPE_CHECKING:
    from vllm_kvzip.core import EarlierPages, KeepPlan
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
        earlier: EarlierPages | None = None,
    ) -> torch.Tensor:
        """See :meth:`~vllm_kvzip.storage.page_store.PageStore.quantize`; some pages at a time.

        The tokens of earlier pages are read layer by layer.
        """
        assert self._quantization is not None and self._quantized is not None
        layout = self._quantization.layout
        targets = self._quantization.page_ids(targets)[: len(keep.positions)]
        heads = torch.arange(keep.pages.numel(), device=self.device)
        heads = heads.repeat_interleave(keep.pages.flatten(), output_size=len(targets))
        bounds = [0, len(targets)]
        if earlier is not None:
            bounds = [0, *accumulate(earlier.by_layer)]
        for layer, (start, end) in enumerate(pairwise(bounds)):
            stored = None
            if earlier is not None and earlier.ids.shape[2]:
                stored = self._dequantize(earlier.ids[layer])
            for first in range(start, end, PAGES_AT_ONCE):
                part = slice(first, min(first + PAGES_AT_ONCE, end))
                positions, of_pages = keep.positions[part], heads[part]
                width = 0 if earlier is None else earlier.ids.shape[2] * layout.page_tokens
                keys, values = self._turned(
                    sources.flatten(0, 1), positions, width, of_pages, transform, earlier is None
                )
                rows = torch.arange(positions.numel(), device=self.device).view_as(positions)
                if stored is not None:
                    of_layer = of_pages[:, None] - layer * keep.pages.shape[1]
                    there = positions.numel() + of_layer * width + positions
                    rows = torch.where(positions < width, there, rows)
                    keys, values = (
                        torch.cat(both) for both in zip((keys, values), stored, strict=True)
                    )
                rows = torch.where(positions < 0, -1, rows)
                quantize_pages(
                    keys, values, rows, self._quantized, targets[part], layout, self._code_book
                )
        return targets

    def _turned(
        self,
        by_head: torch.Tensor,
        positions: torch.Tensor,
        width: int,
        heads: torch.Tensor,
        transform: KeyTransform,
        from_prompt: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of ordinary pages as quantized ones hold them, float32 ``[n * Q, D]``.

        Args:
            by_head: int64 ``[L * H, n]``, pages of each head.
            positions: int64 ``[n, Q]``, of their tokens from ``width`` on.
            width: see above.
            heads: int64 ``[n]``, whose tokens they are.
            transform: of keys.
            from_prompt: whether positions are those of the prompt.
        """
        assert self._quantization is not None
        index, page_tokens = (positions - width).clamp(min=0), self._keys.shape[1]
        pages = by_head[heads[:, None], index // page_tokens]
        keys, values = (
            self._rows(half, which, pages, index, heads)
            for half, which in ((self._keys, KEYS), (self._values, VALUES))
        )
        of_heads = transform.flat.at(heads)
        if from_prompt:
            keys = of_heads.apply(keys.float(), positions)
        else:
            keys = of_heads.centred(keys.float())
        turn = self._quantization.turn
        return turn(keys.flatten(0, 1)), turn(values.flatten(0, 1))

    def _dequantize(self, page_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens of quantized pages, still turned; float32 ``[n * Q, D]``.

        Args:
            page_ids: int64, n of them in any shape.
        """
        assert self._quantization is not None and self._quantized is not None
        layout = self._quantization.layout
        shape = (page_ids.numel() * layout.page_tokens, layout.head_dim)
        keys, values = torch.empty(2, *shape, device=self.device)
        dequantize_pages(self._quantized, page_ids.flatten(), keys, values, layout, self._code_book)
        return keys, values

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
