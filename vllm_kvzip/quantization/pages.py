"""Keys and values as the bytes of quantized pages, and back: what the Triton kernels must equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vllm_kvzip.quantization.base import Encoded

if TYPE_CHECKING:
    from vllm_kvzip.quantization.layout import HalfPage, PageLayout


def pack_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: PageLayout,
    pages: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize tokens into pages.

    Args:
        keys, values: float32, bfloat16 or float16 ``[T, D]``, finite. Where T does not fill the
            last page, its other tokens are zeros.
        layout: of the pages.
        pages: uint8 ``[ceil(T / page tokens), page_bytes]``, written in place, but for the bytes
            that belong to no region; made of zeros when None.

    Returns:
        ``pages``.
    """
    num_pages = -(-len(keys) // layout.page_tokens)
    if pages is None:
        pages = keys.new_zeros((num_pages, layout.page_bytes), dtype=torch.uint8)
    for vectors, half in ((keys, layout.keys), (values, layout.values)):
        padded = vectors.new_zeros((num_pages * layout.page_tokens, layout.head_dim))
        padded[: len(vectors)] = vectors
        encoded = half.format.encode(padded.view(num_pages, layout.page_tokens, layout.head_dim))
        for region, stored in zip(_regions(pages, half, layout), _parts(encoded), strict=True):
            region.copy_(stored.flatten(1))
    return pages


def unpack_pages(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of pages, in order.

    Args:
        pages: uint8 ``[n, page_bytes]``.
        layout: of the pages.

    Returns:
        Keys and values, float32 ``[n * page tokens, D]``.
    """
    keys, values = (
        half.format.decode(encoded_half(pages, half, layout)).flatten(0, 1)
        for half in (layout.keys, layout.values)
    )
    return keys, values


def encoded_half(pages: torch.Tensor, half: HalfPage, layout: PageLayout) -> Encoded:
    """The keys, or the values, of pages as they are stored; ``[n, Q, ...]``, copies.

    Args:
        pages: uint8 ``[n, page_bytes]``.
        half: which.
        layout: of the pages.
    """
    shape, head_dim = (len(pages), layout.page_tokens), layout.head_dim
    codes, scales, *group = _regions(pages, half, layout)
    return Encoded(
        codes.reshape(*shape, half.format.code_bytes(head_dim)),
        scales.reshape(*shape, half.format.scale_bytes(head_dim)),
        group[0].clone().view(torch.float32)[:, 0] if group else None,
    )


def _parts(encoded: Encoded) -> list[torch.Tensor]:
    """What goes into the regions of :func:`_regions`."""
    parts = [encoded.codes, encoded.scales]
    if encoded.group_scale is not None:
        parts.append(encoded.group_scale[:, None].contiguous().view(torch.uint8))
    return parts


def _regions(pages: torch.Tensor, half: HalfPage, layout: PageLayout) -> list[torch.Tensor]:
    """Codes, scales, and the group scale if there is one, of some pages; views ``[n, bytes]``."""
    tokens, head_dim = layout.page_tokens, layout.head_dim
    sizes = [
        (half.codes_offset, tokens * half.format.code_bytes(head_dim)),
        (half.scales_offset, tokens * half.format.scale_bytes(head_dim)),
        (half.group_offset, half.format.group_bytes),
    ]
    return [pages[:, start : start + size] for start, size in sizes if size]
