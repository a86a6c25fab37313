"""The arithmetic of head pages: boundary, block counts, dealing pages to heads, page tables.

A head page is the part of a block that belongs to one KV head of one layer. Once a block is ours,
nothing forces the page of (layer, head) to serve that layer and head: a request's compressed blocks
are dealt out page by page, so budgets may differ over layers and heads while the request holds
``ceil(total pages / (L * H))`` blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, TypeVar

import torch

from vllm_kvzip import request_options
from vllm_kvzip.core import CompressedPrefix, PrefixPlan

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.request_options import RequestOptions

T = TypeVar("T")

_EPSILON = 1e-9  # 0.3 * 10 is 3.0000000000000004 in floating point, and must stay 3 blocks
_SPARE_BLOCKS = 2  # vLLM's null block, and one for tokens behind the prompt


@dataclass(frozen=True)
class PrefixRule:
    """How a prompt's length and a request's options decide what is compressed, in how many blocks.

    What a compressed prefix looks like depends on nothing behind its boundary, so that every
    prompt with the same first tokens and the same keep ratio can share it.

    Attributes:
        keep_ratio: kept / all KV pairs of the prefix, in (0, 1]; a request may name its own.
        min_prompt_tokens: shorter prompts, or declared contexts, are left alone.
        sink_tokens: first tokens of the prefix that every head keeps.
        recent_tokens: last tokens of the prefix that every head keeps.
        block_size: tokens per block.
        min_output_tokens: requests that generate fewer are left alone, unless they declare a
            context that others shall reuse.
        pool_blocks: blocks of the whole pool; a prompt that would not fit into it together with
            its compressed prefix is left alone. None: not known.
    """

    keep_ratio: float
    min_prompt_tokens: int
    sink_tokens: int
    recent_tokens: int
    block_size: int
    min_output_tokens: int = 0
    pool_blocks: int | None = None

    def plan(
        self, num_prompt_tokens: int, options: RequestOptions = request_options.DEFAULT
    ) -> PrefixPlan | None:
        """The plan for a prompt, or None when it is left alone.

        Args:
            num_prompt_tokens: length of the prompt.
            options: what the request asks for.
        """
        if self.skip_reason(num_prompt_tokens, options) is not None:
            return None
        num_blocks = self._num_prefix_blocks(num_prompt_tokens, options)
        boundary = num_blocks * self.block_size
        return PrefixPlan(
            boundary_tokens=boundary,
            num_prefix_blocks=num_blocks,
            num_compressed_blocks=self._num_compressed_blocks(num_blocks, options),
            ready_tokens=num_prompt_tokens if options.context_tokens is None else boundary,
            keep_ratio=self.wanted_ratio(options),
        )

    def skip_reason(
        self, num_prompt_tokens: int, options: RequestOptions = request_options.DEFAULT
    ) -> str | None:
        """Why a prompt is left alone, one of ``metrics.SKIP_REASONS``; None when it is not.

        At the server's keep ratio 1.0 nothing is freed either, but the prompt goes through the
        whole machinery: its output must equal that of stock vLLM, which is how a deployment is
        checked.
        """
        if options.is_off:
            return "off_by_request"
        num_blocks = self._num_prefix_blocks(num_prompt_tokens, options)
        context = options.context_tokens
        if num_blocks == 0 or self.min_prompt_tokens > (
            num_prompt_tokens if context is None else context
        ):
            return "below_min_prompt_tokens"
        num_output = options.max_output_tokens
        if context is None and num_output is not None and num_output < self.min_output_tokens:
            return "below_min_output_tokens"
        num_compressed = self._num_compressed_blocks(num_blocks, options)
        is_check = self.keep_ratio == self.wanted_ratio(options) == 1
        if num_compressed >= num_blocks and not is_check:
            return "nothing_to_free"
        if self.pool_blocks is not None:
            crossing = ceil(num_prompt_tokens / self.block_size) + num_compressed
            if crossing > self.pool_blocks - _SPARE_BLOCKS:
                return "no_room"
        return None

    def wanted_ratio(self, options: RequestOptions) -> float:
        """The keep ratio of a request: its own, or the server's."""
        return self.keep_ratio if options.keep_ratio is None else options.keep_ratio

    def protected_in_prefix(self, boundary_tokens: int) -> tuple[int, int]:
        """Protected tokens of a prefix of ``boundary_tokens`` tokens: (first ones, last ones)."""
        num_sinks = min(self.sink_tokens, boundary_tokens)
        return num_sinks, min(self.recent_tokens, boundary_tokens - num_sinks)

    def min_pages_per_head(self, boundary_tokens: int) -> int:
        """Head pages that every head needs for its protected tokens, at least one."""
        return max(1, ceil(sum(self.protected_in_prefix(boundary_tokens)) / self.block_size))

    def max_compressed_blocks(self, max_tokens: int) -> int:
        """The most blocks any prompt of up to ``max_tokens`` tokens needs, unless it says more."""
        return self._num_compressed_blocks(max_tokens // self.block_size, request_options.DEFAULT)

    def _num_prefix_blocks(self, num_prompt_tokens: int, options: RequestOptions) -> int:
        end = num_prompt_tokens if options.context_tokens is None else options.context_tokens
        return min(end, num_prompt_tokens) // self.block_size

    def _num_compressed_blocks(self, num_blocks: int, options: RequestOptions) -> int:
        wanted = ceil(self.wanted_ratio(options) * num_blocks - _EPSILON)
        return min(num_blocks, max(wanted, self.min_pages_per_head(num_blocks * self.block_size)))


@dataclass(frozen=True)
class PagePool:
    """Where head pages lie in a flat pool; all strides are counted in head pages.

    The default is the layout ``LBHNC``: layers outermost, then blocks, then KV heads. Page ids can
    exceed 32 bits in bytes but not in pages; element offsets must be computed in 64 bits.
    """

    num_blocks: int
    num_layers: int
    num_kv_heads: int
    first_page: int = 0
    layer_stride: int | None = None
    block_stride: int | None = None

    @property
    def strides(self) -> tuple[int, int]:
        """(layer stride, block stride) in head pages."""
        block_stride = self.num_kv_heads if self.block_stride is None else self.block_stride
        if self.layer_stride is None:
            return self.num_blocks * block_stride, block_stride
        return self.layer_stride, block_stride

    def page_id(self, layer: int, block: int, head: int) -> int:
        """Page of one layer, block and KV head."""
        layer_stride, block_stride = self.strides
        return self.first_page + layer * layer_stride + block * block_stride + head

    def page_ids(self, blocks: torch.Tensor) -> torch.Tensor:
        """Pages of whole blocks.

        Args:
            blocks: int ``[n]``, block ids.

        Returns:
            int64 ``[L, H, n]``.
        """
        layer_stride, block_stride = self.strides
        layers = torch.arange(self.num_layers) * layer_stride
        heads = torch.arange(self.num_kv_heads)
        in_layer = heads[:, None] + blocks.to(torch.int64)[None, :] * block_stride
        return self.first_page + layers[:, None, None] + in_layer[None]


def deal_pages(block_ids: Sequence[int], pages: torch.Tensor, pool: PagePool) -> torch.Tensor:
    """Deal the head pages of some blocks to the heads.

    Args:
        block_ids: blocks that hold the compressed prefix.
        pages: int64 ``[L, H]``, head pages each head gets.
        pool: where pages lie.

    Returns:
        int64 ``[sum of pages]``, page ids in (layer, KV head) order.

    Raises:
        ValueError: if the blocks hold fewer pages than asked for.
    """
    available = pool.page_ids(torch.tensor(block_ids, dtype=torch.int64)).permute(2, 0, 1).flatten()
    total = int(pages.sum())
    if total > len(available):
        raise ValueError(
            f"{total} head pages asked of {len(block_ids)} blocks with {len(available)}"
        )
    return available[:total]


def fold_row(row: Sequence[T], plan: PrefixPlan, reserve_start: int, null: T) -> list[T]:
    """The folded form of a crossing row: ``[compressed][null ...][dense tail ...]``.

    ``row`` is ``[prompt][reserve][blocks allocated since]`` with the reserve at ``reserve_start``.
    The result's length is the row's length without the reserve, that is vLLM's logical length.
    """
    count = plan.num_compressed_blocks
    compressed = list(row[reserve_start : reserve_start + count])
    nulls = [null] * plan.num_freed_blocks
    tail = [*row[plan.num_prefix_blocks : reserve_start], *row[reserve_start + count :]]
    return compressed + nulls + tail


class HeadPageTable:
    """Page tables of a batch of compressed requests: every (request, KV head) pair is a sequence.

    Attributes:
        table: int32 ``[L, R * H, W]``; ``table[l, r * H + h]`` lists the head pages of KV head
            ``h`` of request ``r`` in layer ``l``: its compressed pages, then its dense tail.
        compressed_pages: int64 ``[L, R * H]``, how many of them are compressed.
    """

    def __init__(self, table: torch.Tensor, compressed_pages: torch.Tensor, pool: PagePool) -> None:
        self.table = table
        self.compressed_pages = compressed_pages
        self._pool = pool
        self._num_tail_blocks = [0] * (table.shape[1] // pool.num_kv_heads)

    @classmethod
    def build(
        cls, prefixes: Sequence[CompressedPrefix], pool: PagePool, spare_columns: int = 8
    ) -> HeadPageTable:
        """A table with the compressed pages of each request and no tail yet.

        Args:
            prefixes: one per request, in batch order.
            pool: where pages lie.
            spare_columns: room for tail blocks; grows as needed.
        """
        num_layers, num_heads = pool.num_layers, pool.num_kv_heads
        pages = torch.stack([prefix.pages for prefix in prefixes], dim=1)  # [L, R, H]
        width = max(prefix.padded.shape[2] for prefix in prefixes) + spare_columns
        shape = (num_layers, len(prefixes), num_heads, width)
        table = torch.zeros(shape, dtype=torch.int32)
        for index, prefix in enumerate(prefixes):
            table[:, index, :, : prefix.padded.shape[2]] = prefix.padded
        return cls(
            table.view(num_layers, -1, width), pages.reshape(num_layers, -1).contiguous(), pool
        )

    def num_tail_blocks(self, request: int) -> int:
        """Tail blocks of request number ``request`` that the table knows."""
        return self._num_tail_blocks[request]

    def append_tail(self, request: int, blocks: torch.Tensor) -> None:
        """Put dense blocks behind everything request number ``request`` has so far.

        Args:
            request: index in the batch.
            blocks: int ``[n]``, block ids in logical order.
        """
        num_heads = self._pool.num_kv_heads
        rows = slice(request * num_heads, (request + 1) * num_heads)
        known = self._num_tail_blocks[request]
        first = self.compressed_pages[:, rows] + known  # [L, H]
        needed = int(first.max()) + len(blocks)
        if needed > self.table.shape[2]:
            grown = torch.zeros(*self.table.shape[:2], needed + needed // 4, dtype=torch.int32)
            grown[:, :, : self.table.shape[2]] = self.table
            self.table = grown
        columns = first[:, :, None] + torch.arange(len(blocks))
        ids = self._pool.page_ids(blocks).to(torch.int32)
        self.table[:, rows].scatter_(2, columns, ids)
        self._num_tail_blocks[request] = known + len(blocks)
