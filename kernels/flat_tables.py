"""Page tables of all layers, laid out for kernels that want a rectangle per layer.

FlashAttention and other paged kernels take a block table ``[sequences, columns]`` and lengths. With
a (request, KV head) pair as sequence and the flat pool as cache they attend over head pages as
they are; one launch per step lays out the tables of every layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .page_tables import find_pages, find_pair

if TYPE_CHECKING:
    import torch

    from .page_tables import PageTables

COLUMNS = 256
"""Columns that one program lays out."""


@triton.jit(
    do_not_specialize=["width", "num_rows", "flat_layer_stride", "flat_row_stride", "first_page"]
)
def lay_out(
    offsets, boundaries, slots, block_table, seq_lens, flat, lengths,
    width, num_rows, first_page, layer_stride, block_stride,
    table_stride, flat_layer_stride, flat_row_stride,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, N: tl.constexpr, PER_HEAD: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of one pair's row in one layer; grid ``(tiles of columns, R * H, L)``."""
    row = tl.program_id(1)
    layer = tl.program_id(2)
    request = row // HEADS
    head = row % HEADS
    begin, num_pages, boundary, num_tokens = find_pair(
        offsets, boundaries, slots, seq_lens, request, layer * HEADS + head, PAIRS, N
    )
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    wanted = columns < tl.cdiv(num_tokens, N)
    tail_page = first_page + layer.to(tl.int64) * layer_stride + head * PER_HEAD
    table_row = block_table + request.to(tl.int64) * table_stride
    pages = find_pages(
        columns, wanted, begin, num_pages, boundary, table_row, tail_page, first_page,
        layer_stride, block_stride, HEADS, PAIRS, PER_HEAD,
    )  # fmt: skip
    place = flat + layer.to(tl.int64) * flat_layer_stride + row.to(tl.int64) * flat_row_stride
    tl.store(place + columns, pages.to(tl.int32), mask=wanted & (columns < width))
    if tl.program_id(0) == 0:
        tl.store(lengths + layer * num_rows + row, tl.maximum(num_tokens, 0))


def flatten_tables(tables: PageTables, flat: torch.Tensor, lengths: torch.Tensor) -> None:
    """Lay out the pages and lengths of every pair and layer in buffers that live from step to step.

    Columns behind a pair's last page keep what they held; no kernel reads them.

    Args:
        tables: where each request's KV pairs lie.
        flat: int32 ``[L, R * H, W]``, last dimension contiguous; written.
        lengths: int32 ``[L, R * H]``, contiguous; written, tokens of each pair.

    Raises:
        ValueError: if there is a quantized tier, which such kernels cannot read.
    """
    if tables.quantized_offsets is not None:
        raise ValueError("tables with quantized pages cannot be laid out for other kernels")
    num_layers, num_pairs, width = flat.shape
    place = tables.place
    lay_out[triton.cdiv(width, COLUMNS), num_pairs, num_layers](
        tables.offsets, tables.boundary_pages, tables.slots, tables.block_table, tables.seq_lens,
        flat, lengths,
        width, num_pairs, place.first_page, place.layer_stride, place.block_stride,
        tables.block_table.stride(0), flat.stride(0), flat.stride(1),
        HEADS=tables.num_kv_heads, PAIRS=tables.num_pairs, N=tables.page_tokens,
        PER_HEAD=place.pages_per_head, COLUMNS=COLUMNS, num_warps=4,
    )  # fmt: skip
