"""Quantized pages as float32 keys and values, as quickly as torch reads them on a CPU.

The reference is ``unpack_pages``. A format may leave the dimensions of a vector in an order of its
own, which costs nothing where the other operand of a product is put into that order instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.quantization.pages import encoded_half

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.quantization.layout import PageLayout


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
        self.key_order = layout.key_format.reading_order(layout.head_dim)
        self.value_order = layout.value_format.reading_order(layout.head_dim)

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of pages, float32 ``[n, Q, D]``, columns in the orders above.

        Args:
            pages: uint8 ``[n, page_bytes]``.
        """
        layout = self.layout
        keys, values = (
            half.format.read(encoded_half(pages, half, layout))
            for half in (layout.keys, layout.values)
        )
        return keys, values
