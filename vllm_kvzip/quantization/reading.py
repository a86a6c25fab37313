"""Quantized pages as float32 keys and values, as quickly as torch reads them on a CPU.

The reference is ``unpack_pages``. Two 4-bit codes that share a byte are looked up at once, in a
table of 256 pairs; that leaves the dimensions of a block in an order of their own, which costs
nothing where the other operand of a product is put into that order instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_kvzip.quantization.packing import float8_decode

if TYPE_CHECKING:
    from vllm_kvzip.quantization.layout import HalfPage, PageLayout


class PageReader:
    """Reads pages of one layout.

    Args:
        layout: of the pages.

    Attributes:
        layout: of the pages.
        key_order, value_order: int64 ``[D]``; what is read in column ``i`` is dimension
            ``order[i]``.
    """

    def __init__(self, layout: PageLayout) -> None:
        self.layout = layout
        self._keys = _HalfReader(layout.keys, layout)
        self._values = _HalfReader(layout.values, layout)
        self.key_order, self.value_order = self._keys.order, self._values.order

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of pages, float32 ``[n, Q, D]``, columns in the orders above.

        Args:
            pages: uint8 ``[n, page_bytes]``.
        """
        return self._keys.read(pages), self._values.read(pages)


class _HalfReader:
    """Reads the keys, or the values."""

    def __init__(self, half: HalfPage, layout: PageLayout) -> None:
        self._half = half
        self._tokens = layout.page_tokens
        self._head_dim = head_dim = layout.head_dim
        self._block = half.format.block_values(head_dim)
        self.order = torch.arange(head_dim)
        self._pairs = None
        if half.format.kernel_name != "int8":
            self.order = self.order.view(-1, 2, self._block // 2).transpose(1, 2).flatten()
            book = half.format.code_book
            levels = torch.arange(16).float() if book is None else book.float()
            byte = torch.arange(256)
            pairs = torch.stack([levels[byte % 16], levels[byte // 16]], dim=1)
            self._pairs = pairs.view(torch.int64).flatten()

    def read(self, pages: torch.Tensor) -> torch.Tensor:
        """float32 ``[n, Q, D]``."""
        half, tokens = self._half, self._tokens
        code_bytes = tokens * half.format.code_bytes(self._head_dim)
        scale_bytes = tokens * half.format.scale_bytes(self._head_dim)
        codes = pages[:, half.codes_offset : half.codes_offset + code_bytes]
        scales = pages[:, half.scales_offset : half.scales_offset + scale_bytes].contiguous()
        shape = (len(pages), tokens, self._head_dim // self._block)
        zeros = None
        if half.format.group_bytes:
            group = pages[:, half.group_offset : half.group_offset + 4].contiguous()
            scale = float8_decode(scales).view(shape) * group.view(torch.float32)[:, :, None]
        else:
            scale = scales.view(torch.bfloat16).float().view(*shape[:2], -1)
            if scale.shape[2] > shape[2]:
                scale, zeros = scale.chunk(2, dim=2)
        if self._pairs is None:
            numbers = codes.contiguous().view(torch.int8).float()
        else:
            index = codes.reshape(-1).to(torch.int32)
            numbers = self._pairs.index_select(0, index).view(torch.float32)
        blocks = numbers.view(*shape, self._block)
        blocks *= scale[..., None]
        if zeros is not None:
            blocks += zeros[..., None]
        return blocks.flatten(2)
