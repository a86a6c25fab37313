"""Where the KV pairs of a batch lie: compressed prefixes page by page, dense tails block by block.

Kernels read these tables as they are, so nothing is laid out again per layer or per step. A request
without a compressed prefix is one whose prefix is empty: slot 0, boundary 0.

Letters: L layers, H KV heads, G query heads per KV head, D head dim, N tokens per page, R requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class PagePlace:
    """Where the page of a (layer, block, KV head) lies in the flat pool, counted in pages."""

    layer_stride: int
    block_stride: int
    first_page: int = 0


@dataclass(frozen=True)
class PageTables:
    """The KV pairs that each request of a batch attends over.

    KV head ``h`` of layer ``l`` of request ``r`` attends over the pages
    ``arena[offsets[slots[r], l * H + h] : offsets[slots[r], l * H + h + 1]]``, all of them full,
    then over the blocks of ``block_table[r]`` from ``boundary_blocks[r]`` on.

    Attributes:
        arena: int32 ``[A]``, page ids of all compressed prefixes, each in (layer, KV head) order.
        offsets: int32 ``[slots, L * H + 1]``, into ``arena``; those of slot 0 are all equal.
        slots: int32 ``[R]``, which prefix a request begins with; 0 for none.
        boundary_blocks: int32 ``[R]``, blocks whose tokens the prefix stands for.
        block_table: int32 ``[R, W]``, vLLM's, in logical order.
        seq_lens: int32 ``[R]``, logical lengths in tokens, this step's tokens included.
        place: of the pages of a block.
        num_kv_heads: H.
        page_tokens: N.
    """

    arena: torch.Tensor
    offsets: torch.Tensor
    slots: torch.Tensor
    boundary_blocks: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    place: PagePlace
    num_kv_heads: int
    page_tokens: int

    @property
    def num_layers(self) -> int:
        """L."""
        return (self.offsets.shape[1] - 1) // self.num_kv_heads

    def pages_of(self, layer: int, request: int, head: int) -> tuple[torch.Tensor, int]:
        """Plain-torch look-up.

        Returns:
            int64 ``[pages]``, page ids in the order of positions, and the tokens in them; the last
            page may be part full.
        """
        pair = layer * self.num_kv_heads + head
        begin, end = self.offsets[int(self.slots[request]), pair : pair + 2].tolist()
        boundary = int(self.boundary_blocks[request])
        tail_tokens = int(self.seq_lens[request]) - boundary * self.page_tokens
        num_tail = -(-tail_tokens // self.page_tokens)
        blocks = self.block_table[request, boundary : boundary + num_tail].long()
        place = self.place
        tail = place.first_page + layer * place.layer_stride + blocks * place.block_stride + head
        pages = torch.cat([self.arena[begin:end].long(), tail])
        return pages, (end - begin) * self.page_tokens + tail_tokens


def gather_pages(pages: torch.Tensor, page_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first ``num_tokens`` rows of some pages.

    Args:
        pages: ``[P, N, D]``.
        page_ids: int64 ``[n]``.
        num_tokens: how many rows.

    Returns:
        ``[num_tokens, D]``, a copy.
    """
    return pages[page_ids].flatten(0, 1)[:num_tokens]


def pack_prefixes(
    prefixes: Sequence[tuple[torch.Tensor, torch.Tensor]], num_heads_of_all_layers: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Arena and offsets of some compressed prefixes; prefix ``i`` gets slot ``i + 1``.

    Args:
        prefixes: page ids int ``[sum of pages]`` in (layer, KV head) order, and int ``[L, H]``,
            pages of each head.
        num_heads_of_all_layers: L * H.

    Returns:
        int32 ``[A]`` and int32 ``[len(prefixes) + 1, L * H + 1]``.
    """
    offsets = torch.zeros(len(prefixes) + 1, num_heads_of_all_layers + 1, dtype=torch.int32)
    arena = [torch.zeros(1, dtype=torch.int32)]  # never empty, so that it has an address
    used = 1
    for slot, (page_ids, pages) in enumerate(prefixes, start=1):
        offsets[slot] = used
        offsets[slot, 1:] += pages.flatten().cumsum(0).to(torch.int32)
        arena.append(page_ids.to(torch.int32))
        used += len(page_ids)
    return torch.cat(arena), offsets


@triton.jit
def find_pair(offsets, slots, boundaries, seq_lens, request, pair, offsets_stride, N: tl.constexpr):
    """Where a pair's pages begin in the arena, how many, its boundary block, and its tokens.

    ``pair`` is ``l * H + h``.
    """
    row = offsets + tl.load(slots + request).to(tl.int64) * offsets_stride
    begin = tl.load(row + pair)
    num_pages = tl.load(row + pair + 1) - begin
    boundary = tl.load(boundaries + request)
    num_tokens = num_pages * N + tl.load(seq_lens + request) - boundary * N
    return begin, num_pages, boundary, num_tokens


@triton.jit
def find_pages(page, wanted, arena, begin, num_pages, table_row, boundary, tail_page, block_stride):
    """Page ids, int64, of the pages number ``page`` of a pair; see :class:`PageTables`.

    ``tail_page`` is the page of block 0 of the pair's layer and KV head.
    """
    compressed = page < num_pages
    kept = tl.load(arena + begin + page, mask=wanted & compressed, other=0)
    index = tl.maximum(boundary + page - num_pages, 0)
    block = tl.load(table_row + index, mask=wanted & (page >= num_pages), other=0)
    dense = tail_page + block.to(tl.int64) * block_stride
    return tl.where(compressed, kept.to(tl.int64), dense)
