"""The arithmetic of head pages: where they lie, dealing them to heads, page tables.

A head page is the part of a block that belongs to one KV head of one layer, or one of several equal
parts of it where blocks are large. Once a block is ours, nothing forces the page of (layer, head)
to serve that layer and head: a request's compressed blocks are dealt out page by page, so budgets
may differ over layers and heads while the request holds ``ceil(total pages / pages of a block)``
blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_kvzip.core import CompressedPrefix, PrefixPlan

T = TypeVar("T")


@dataclass(frozen=True)
class PagePool:
    """Where head pages lie in a flat pool; all strides are counted in head pages.

    The default is the layout ``LBHNC``: layers outermost, then blocks, then KV heads, whose pages
    in a block lie side by side. Page ids can exceed 32 bits in bytes but not in pages; element
    offsets must be computed in 64 bits.

    Attributes:
        num_blocks: of the pool.
        num_layers, num_kv_heads: L, H.
        first_page, layer_stride, block_stride: where the pages of layer 0 and block 0 begin, and
            how far those of the next layer and of the next block are.
        pages_per_head: M, pages of one KV head of one layer in a block.
    """

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    first_page: int = 0
    layer_stride: int | None = None
    block_stride: int | None = None
    pages_per_head: int = 1

    @property
    def strides(self) -> tuple[int, int]:
        """(layer stride, block stride) in head pages."""
        block_stride = self.block_stride
        if block_stride is None:
            block_stride = self.num_kv_heads * self.pages_per_head
        if self.layer_stride is None:
            return self.num_blocks * block_stride, block_stride
        return self.layer_stride, block_stride

    def page_id(self, layer: int, block: int, head: int) -> int:
        """First page of one layer, block and KV head."""
        layer_stride, block_stride = self.strides
        in_block = head * self.pages_per_head
        return self.first_page + layer * layer_stride + block * block_stride + in_block

    def page_ids(self, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of whole blocks.

        Args:
            blocks: int ``[n]``, block ids.

        Returns:
            int64 ``[L, H, n * M]``, in the order of their tokens, on the device of ``blocks``.
        """
        layer_stride, block_stride = self.strides
        layers = torch.arange(self.num_layers, device=blocks.device) * layer_stride
        in_block = torch.arange(self.num_kv_heads * self.pages_per_head, device=blocks.device)
        in_block = in_block.view(self.num_kv_heads, 1, self.pages_per_head)
        in_layer = in_block + blocks.to(torch.int64)[:, None] * block_stride  # [H, n, M]
        return self.first_page + layers[:, None, None] + in_layer.flatten(1)


def deal_pages(blocks: torch.Tensor, total: int, pool: PagePool) -> torch.Tensor:
    """Deal the head pages of some blocks to the heads, in (block, layer, KV head, part) order.

    Kernels rely on the order: they compute a page from its number in the prefix.

    Args:
        blocks: int ``[n]``, blocks that hold the compressed prefix.
        total: head pages that all heads get.
        pool: where pages lie.

    Returns:
        int64 ``[total]``, page ids; the heads take them in (layer, KV head) order.

    Raises:
        ValueError: if the blocks hold fewer pages than asked for.
    """
    ids = pool.page_ids(blocks).unflatten(2, (len(blocks), pool.pages_per_head))
    available: torch.Tensor = ids.permute(2, 0, 1, 3).flatten()
    if total > len(available):
        raise ValueError(f"{total} head pages asked of {len(blocks)} blocks with {len(available)}")
    return available[:total]


def fold_row(row: Sequence[T], plan: PrefixPlan, reserve_start: int, null: T) -> list[T]:
    """The folded form of a crossing row: ``[compressed][null ...][dense tail ...]``.

    ``row`` is ``[prompt][reserve][blocks allocated since]`` with the reserve at ``reserve_start``;
    the prompt may begin with what an earlier compression kept, and nulls.
    The result's length is the row's length without the reserve, that is vLLM's logical length.
    """
    count = plan.num_compressed_blocks
    compressed = list(row[reserve_start : reserve_start + count])
    nulls = [null] * plan.num_saved_blocks
    tail = [*row[plan.num_prefix_blocks : reserve_start], *row[reserve_start + count :]]
    return compressed + nulls + tail


class HeadPageTable:
    """Page tables of a batch of compressed requests: every KV head of a request is a sequence.

    Attributes:
        table: int32 ``[L, R * H, W]``; ``table[l, r * H + h]`` lists the head pages of KV head
            ``h`` of request ``r`` in layer ``l``: its compressed pages, then its dense tail.
        compressed_pages: int64 ``[L, R * H]``, how many of them are compressed.
    """

    def __init__(self, table: torch.Tensor, compressed_pages: torch.Tensor, pool: PagePool) -> None:
        self.table = table
        self.compressed_pages = compressed_pages
        self._pool = pool
        self._num_tail_pages = torch.zeros(table.shape[1] // pool.num_kv_heads, dtype=torch.int64)

    @classmethod
    def build(
        cls,
        prefixes: Sequence[CompressedPrefix],
        pool: PagePool,
        spare_columns: int = 8,
        earlier: HeadPageTable | None = None,
        stay: Mapping[int, int] | None = None,
    ) -> HeadPageTable:
        """A table with the compressed pages of each request, and the tails of those that stay.

        Args:
            prefixes: one per request, in batch order.
            pool: where pages lie.
            spare_columns: room for tail blocks; grows as needed.
            earlier: the table of the batch before.
            stay: request number -> its number in ``earlier``, whose rows are taken as they are.
        """
        num_layers, num_heads = pool.num_layers, pool.num_kv_heads
        stay = stay or {}
        pages = torch.stack([prefix.pages for prefix in prefixes], dim=1)  # [L, R, H]
        fresh = [index for index in range(len(prefixes)) if index not in stay]
        width = max((prefixes[index].padded.shape[2] for index in fresh), default=0)
        if earlier is not None and stay:
            width = max(width, *(earlier._width(number) for number in stay.values()))
        shape = (num_layers, len(prefixes), num_heads, width + spare_columns)
        table = torch.zeros(shape, dtype=torch.int32)
        for index in fresh:
            padded = prefixes[index].padded
            table[:, index, :, : padded.shape[2]] = padded
        built = cls(table.flatten(1, 2), pages.reshape(num_layers, -1).contiguous(), pool)
        if earlier is not None and stay:
            old = earlier.table.view(num_layers, -1, num_heads, earlier.table.shape[2])
            table[:, list(stay), :, : old.shape[3]] = old[:, list(stay.values()), :, : shape[3]]
            built._num_tail_pages[list(stay)] = earlier._num_tail_pages[list(stay.values())]
        return built

    def num_tail_blocks(self, request: int) -> int:
        """Tail blocks of request number ``request`` that the table knows."""
        return int(self._num_tail_pages[request]) // self._pool.pages_per_head

    def _width(self, request: int) -> int:
        """Columns in use."""
        num_heads = self._pool.num_kv_heads
        rows = slice(request * num_heads, (request + 1) * num_heads)
        return int(self.compressed_pages[:, rows].max() + self._num_tail_pages[request])

    def append_tails(self, requests: torch.Tensor, blocks: torch.Tensor) -> None:
        """Put dense blocks after everything that some requests have so far.

        Args:
            requests: int64 ``[k]``, numbers of requests in the batch, each once.
            blocks: int ``[k, n]``, block ids in logical order, as many of each request.
        """
        pool = self._pool
        in_table = (pool.num_layers, len(self._num_tail_pages), pool.num_kv_heads)
        known = self._num_tail_pages[requests]
        kept = self.compressed_pages.view(in_table)[:, requests]
        first = kept + known[:, None]  # [L, k, H]
        ids = pool.page_ids(blocks.flatten()).to(torch.int32)
        ids = ids.unflatten(2, (len(requests), -1)).transpose(1, 2)  # [L, k, H, pages]
        num_pages = ids.shape[3]
        needed = int(first.max()) + num_pages
        if needed > self.table.shape[2]:
            grown = torch.zeros(*self.table.shape[:2], needed + needed // 4, dtype=torch.int32)
            grown[:, :, : self.table.shape[2]] = self.table
            self.table = grown
        columns = first[..., None] + torch.arange(num_pages)
        layers, heads = torch.arange(in_table[0]), torch.arange(in_table[2])
        places = layers[:, None, None, None], requests[:, None, None], heads[:, None], columns
        self.table.view(*in_table, -1)[places] = ids
        self._num_tail_pages[requests] = known + num_pages
