"""Where the KV pairs of a batch lie: compressed prefixes page by page, dense tails block by block.

A request's compressed blocks are dealt to its heads page by page, in (layer, KV head) order, each
block giving its ``P = L * H * M`` pages in that order too. So the ``k``-th page of the whole prefix
is page ``k % P`` of block ``k // P`` of the request's block table row, and all that must be stored
of a prefix is where each head's share begins: ``L * H + 1`` numbers. Kernels compute the rest;
nothing is laid out per layer or per step. A request without a compressed prefix has shares of no
page and boundary 0.

A prefix may have a second tier, of quantized pages, S of which share a head page. The first page
of that tier follows the last full-precision page of the last head, and its pages are dealt to the
heads in the same order; that takes ``L * H + 1`` more numbers. Its keys lack the mean of their head
and have their channels scaled, and its first W tokens lack a vector of their own in place of the
mean, which takes ``(2 + W) * D`` numbers a head.

Letters: L layers, H KV heads, G query heads per KV head, D head dim, N tokens per page, M pages of
a head in a block, Q tokens per quantized page, S quantized pages per head page, R requests.
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
    """Where the M pages of a (layer, block, KV head) lie in the flat pool, counted in pages.

    They lie side by side, and so do those of the KV heads of a layer.
    """

    layer_stride: int
    block_stride: int
    first_page: int = 0
    pages_per_head: int = 1


@dataclass(frozen=True)
class PageTables:
    """The KV pairs that each request of a batch attends over.

    Request ``r`` has slot ``s = slots[r]``. Its KV head ``h`` of layer ``l`` attends over pages
    ``offsets[s, l * H + h]`` to ``offsets[s, l * H + h + 1]`` of its prefix, all of them full, then
    over its own pages in the blocks of ``block_table[r]``, from page ``boundary_pages[s]`` on.

    With a quantized tier it attends over quantized pages ``quantized_offsets[s, l * H + h]`` to
    ``quantized_offsets[s, l * H + h + 1]`` besides; number ``i`` of them is part ``i % S`` of head
    page ``i // S`` of the prefix. All are full, but that no head has more tokens in its prefix than
    ``N * boundary_pages[s]``: its last quantized pages hold fewer, or none.

    Attributes:
        offsets: int32 ``[slots, L * H + 1]``, where each head's pages begin in its prefix.
        boundary_pages: int32 ``[slots]``, pages of a head whose tokens the prefix stands for; they
            fill whole blocks.
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
    boundary_pages: torch.Tensor
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
    def num_pairs(self) -> int:
        """L * H."""
        return self.offsets.shape[1] - 1

    @property
    def num_layers(self) -> int:
        """L."""
        return self.num_pairs // self.num_kv_heads


@triton.jit
def find_pair(
    offsets, boundaries, slots, seq_lens, request, pair, PAIRS: tl.constexpr, N: tl.constexpr
):
    """Where a pair's pages begin, how many there are, the boundary page, and the pair's tokens.

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
    block_stride, HEADS: tl.constexpr, PAIRS: tl.constexpr, PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Page ids, int64, of the pages number ``page`` of a pair; see :class:`PageTables`.

    ``tail_page`` is the first page of block 0 of the pair's own layer and KV head.
    """
    index = begin + page
    compressed = page < num_pages
    column = tl.where(
        compressed, index // (PAIRS * PER_HEAD), (boundary + page - num_pages) // PER_HEAD
    )
    block = tl.load(table_row + column, mask=wanted, other=0)
    owner = find_owner(index, first_page, layer_stride, HEADS, PAIRS, PER_HEAD)
    own = tail_page
    if PER_HEAD > 1:
        own += (page - num_pages) % PER_HEAD  # the boundary is one of blocks
    return block.to(tl.int64) * block_stride + tl.where(compressed, owner, own)


@triton.jit
def find_owner(
    index, first_page, layer_stride, HEADS: tl.constexpr, PAIRS: tl.constexpr,
    PER_HEAD: tl.constexpr,
):  # fmt: skip
    """Head pages, int64, that the pages number ``index`` of a prefix are in block 0."""
    local = index % (PAIRS * PER_HEAD)
    layer = local // (HEADS * PER_HEAD)
    return first_page + layer.to(tl.int64) * layer_stride + local % (HEADS * PER_HEAD)


@triton.jit
def find_quantized_pages(
    page, wanted, begin, table_row, first_page, layer_stride, block_stride,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, PER_HEAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Ids, int64, of the quantized pages number ``page`` of a pair whose first is ``begin``."""
    index = begin + page
    whole = index // SPLIT
    block = tl.load(table_row + whole // (PAIRS * PER_HEAD), mask=wanted, other=0)
    owner = find_owner(whole, first_page, layer_stride, HEADS, PAIRS, PER_HEAD)
    return (block.to(tl.int64) * block_stride + owner) * SPLIT + index % SPLIT
