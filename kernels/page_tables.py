"""Where the KV pairs of a batch lie: compressed prefixes page by page, dense tails block by block.

A request's compressed blocks are dealt to its heads page by page, in (layer, KV head) order, each
block giving its pages in that order too. So the ``k``-th page of the whole prefix is page
``k % (L * H)`` of block ``k // (L * H)`` of the request's block table row, and all that must be
stored of a prefix is where each head's share begins: ``L * H + 1`` numbers. Kernels compute the
rest; nothing is laid out per layer or per step. A request without a compressed prefix has shares of
no page and boundary 0.

A prefix may have a second tier, of quantized pages, S of which share a head page. The first page
of that tier follows the last full-precision page of the last head, and its pages are dealt to the
heads in the same order; that takes ``L * H + 1`` more numbers. Its keys lack the mean of their head
and have their channels scaled, and its first W tokens lack a vector of their own in place of the
mean, which takes ``(2 + W) * D`` numbers a head.

Letters: L layers, H KV heads, G query heads per KV head, D head dim, N tokens per page, Q tokens
per quantized page, S quantized pages per head page, R requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PagePlace:
    """Where the page of a (layer, block, KV head) lies in the flat pool, counted in pages."""

    layer_stride: int
    block_stride: int
    first_page: int = 0


@dataclass(frozen=True)
class PageTables:
    """The KV pairs that each request of a batch attends over.

    Request ``r`` has slot ``s = slots[r]``. Its KV head ``h`` of layer ``l`` attends over pages
    ``offsets[s, l * H + h]`` to ``offsets[s, l * H + h + 1]`` of its prefix, all of them full, then
    over the blocks of ``block_table[r]`` from ``boundary_blocks[s]`` on.

    With a quantized tier it attends over quantized pages ``quantized_offsets[s, l * H + h]`` to
    ``quantized_offsets[s, l * H + h + 1]`` besides; number ``i`` of them is part ``i % S`` of head
    page ``i // S`` of the prefix. All are full, but that no head has more tokens in its prefix than
    ``N * boundary_blocks[s]``: its last quantized pages hold fewer, or none.

    Attributes:
        offsets: int32 ``[slots, L * H + 1]``, where each head's pages begin in its prefix.
        boundary_blocks: int32 ``[slots]``, blocks whose tokens the prefix stands for.
        slots: int32 ``[R]``, from the batch to the two above.
        block_table: int32 ``[R, W]``; the blocks of the prefix come first, and the block of logical
            index ``i`` from the boundary on is at column ``i``.
        seq_lens: int32 ``[R]``, logical lengths in tokens, this step's tokens included.
        place: of the pages of a block.
        num_kv_heads: H.
        page_tokens: N.
        quantized_offsets: int32 ``[slots, L * H + 1]``, where each head's quantized pages begin in
            its prefix, counted in quantized pages; the first entry is S times the last one of
            ``offsets``. None: no quantized tier.
        key_transforms: float32 ``[slots, L * H, 2 + W, D]``, contiguous: mean and scale of the keys
            in the quantized tier, which holds ``(key - mean) / scale``, and what stands in the
            place of the mean for the head's first W quantized tokens. None: no quantized tier.
        split: S.
    """

    offsets: torch.Tensor
    boundary_blocks: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    place: PagePlace
    num_kv_heads: int
    page_tokens: int
    quantized_offsets: torch.Tensor | None = None
    key_transforms: torch.Tensor | None = None
    split: int = 1

    @property
    def pages_per_block(self) -> int:
        """L * H."""
        return self.offsets.shape[1] - 1

    @property
    def num_layers(self) -> int:
        """L."""
        return self.pages_per_block // self.num_kv_heads


@triton.jit
def find_pair(
    offsets, boundaries, slots, seq_lens, request, pair, PAIRS: tl.constexpr, N: tl.constexpr
):
    """Where a pair's pages begin, how many there are, the boundary block, and the pair's tokens.

    ``pair`` is ``l * H + h``, and ``PAIRS`` is L * H.
    """
    slot = tl.load(slots + request).to(tl.int64)
    row = offsets + slot * (PAIRS + 1) + pair
    begin = tl.load(row)
    num_pages = tl.load(row + 1) - begin
    boundary = tl.load(boundaries + slot)
    num_tokens = num_pages * N + tl.load(seq_lens + request) - boundary * N
    return begin, num_pages, boundary, num_tokens


@triton.jit
def find_quantized(
    quantized_offsets, slots, request, pair, num_pages, boundary,
    PAIRS: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Where a pair's quantized pages begin, and how many tokens are in them.

    ``num_pages`` and ``boundary`` are what :func:`find_pair` found.
    """
    row = quantized_offsets + tl.load(slots + request).to(tl.int64) * (PAIRS + 1) + pair
    begin = tl.load(row)
    num_quantized = tl.load(row + 1) - begin
    room = tl.maximum((boundary - num_pages) * N, 0)
    return begin, tl.minimum(num_quantized * Q, room)


@triton.jit
def find_pages(
    page, wanted, begin, num_pages, boundary, table_row, tail_page, first_page, layer_stride,
    block_stride, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Page ids, int64, of the pages number ``page`` of a pair; see :class:`PageTables`.

    ``tail_page`` is the page of block 0 of the pair's own layer and KV head.
    """
    index = begin + page
    compressed = page < num_pages
    column = tl.where(compressed, index // PAIRS, boundary + page - num_pages)
    block = tl.load(table_row + column, mask=wanted, other=0)
    local = index % PAIRS
    owner = first_page + (local // HEADS).to(tl.int64) * layer_stride + local % HEADS
    return block.to(tl.int64) * block_stride + tl.where(compressed, owner, tail_page)


@triton.jit
def find_quantized_pages(
    page, wanted, begin, table_row, first_page, layer_stride, block_stride,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Ids, int64, of the quantized pages number ``page`` of a pair whose first is ``begin``."""
    index = begin + page
    whole = index // SPLIT
    block = tl.load(table_row + whole // PAIRS, mask=wanted, other=0)
    local = whole % PAIRS
    owner = first_page + (local // HEADS).to(tl.int64) * layer_stride + local % HEADS
    return (block.to(tl.int64) * block_stride + owner) * SPLIT + index % SPLIT
