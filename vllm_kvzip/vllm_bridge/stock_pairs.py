"""Attention over head pages by vLLM's own GPU kernel, each (request, KV head) pair a sequence.

The pool of head pages is the kernel's cache, with one KV head; the page tables and lengths of all
layers are laid out by one launch a step. The tables take 4 bytes for every page of every pair, so
large batches of long requests are left to our own kernel, which needs none.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_kvzip.kernels.flat_tables import flatten_tables

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_kvzip.vllm_bridge.kernel_batches import KernelBatch

MOST_TABLE_BYTES = 256 * 2**20


@dataclass(frozen=True)
class StockPairs:
    """Requests of one step as (request, KV head) pairs.

    Attributes:
        pages: the flat pool as vLLM's kernel wants a cache, ``[num_pages, 1, N, 2 * D]``.
        metadata: vLLM's metadata of each layer, of the pairs.
        pair_rows: int64 ``[num_tokens * H]``: pair row -> ``token * H + head``; None when every
            request has one token, so that the order is the same.
        num_kv_heads: H.
        layer_index: vLLM layer name -> layer of ``metadata``.
    """

    pages: torch.Tensor
    metadata: list[Any]
    pair_rows: torch.Tensor | None
    num_kv_heads: int
    layer_index: dict[str, int]

    def attend(self, impl: Any, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer for these requests; shapes as in :class:`KernelBatch`."""
        num_tokens, num_query_heads, head_dim = query.shape
        group = num_query_heads // self.num_kv_heads
        shape = (num_tokens * self.num_kv_heads, group, head_dim)
        pair_query, pair_output = query.reshape(shape), output.view(shape)
        target = pair_output
        if self.pair_rows is not None:
            pair_query = pair_query[self.pair_rows]
            target = torch.empty_like(pair_query)
        metadata = self.metadata[self.layer_index[layer.layer_name]]
        impl.attend_over_pairs(layer, pair_query, self.pages, metadata, target)
        if self.pair_rows is not None:
            pair_output.index_copy_(0, self.pair_rows, target)


def fits(batch: KernelBatch) -> bool:
    """Whether the tables of a batch are small enough to be laid out."""
    tables = batch.tables
    num_pages = (
        len(tables.slots) * tables.pages_per_block * -(-batch.max_tokens // tables.page_tokens)
    )
    return 4 * num_pages <= MOST_TABLE_BYTES


def stock_pairs(
    batch: KernelBatch, pages: torch.Tensor, metadata: Any, common: CommonAttentionMetadata
) -> StockPairs:
    """The same requests for vLLM's kernel.

    Args:
        batch: as our kernel takes them.
        pages: see :class:`StockPairs`.
        metadata: vLLM's, of any batch of this engine; what it says of the batch is replaced.
        common: vLLM's metadata of the whole batch.
    """
    tables = batch.tables
    num_heads, num_rows = tables.num_kv_heads, len(tables.slots)
    device = tables.slots.device
    width = -(-batch.max_tokens // tables.page_tokens)
    flat = torch.empty(
        tables.num_layers, num_rows * num_heads, width, dtype=torch.int32, device=device
    )
    lengths = torch.empty(flat.shape[:2], dtype=torch.int32, device=device)
    flatten_tables(tables, flat, lengths)
    starts_cpu = common.query_start_loc_cpu[: num_rows + 1].long()
    query_lens = starts_cpu.diff()
    pair_starts = torch.zeros(num_rows * num_heads + 1, dtype=torch.int32)
    pair_starts[1:] = query_lens.repeat_interleave(num_heads).cumsum(0)
    pair_rows = None
    if batch.max_query_len > 1:
        pair_rows = async_tensor_h2d(_pair_rows(starts_cpu, num_heads), device=device)
    shared = {
        "num_actual_tokens": int(starts_cpu[-1]) * num_heads,
        "max_query_len": batch.max_query_len,
        "query_start_loc": async_tensor_h2d(pair_starts, device=device),
        "max_seq_len": batch.max_tokens,
        "scheduler_metadata": None,
        "slot_mapping": None,
    }
    if hasattr(metadata, "seq_threshold_3D"):
        shared["seq_threshold_3D"] = 0  # its scratch for split sequences has room for requests
    by_layer = [
        replace(metadata, block_table=table, seq_lens=layer_lengths, **shared)
        for table, layer_lengths in zip(flat, lengths, strict=True)
    ]
    return StockPairs(pages, by_layer, pair_rows, num_heads, batch.layer_index)


def _pair_rows(starts: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Pair row -> ``token * H + head``, request after request, head after head; int64."""
    lengths = starts.diff()
    requests = torch.arange(len(lengths)).repeat_interleave(lengths)
    first, length = starts[requests][:, None], lengths[requests][:, None]
    token, head = torch.arange(len(requests))[:, None], torch.arange(num_heads)
    pair_row = first * num_heads + head * length + token - first
    rows = torch.empty(pair_row.numel(), dtype=torch.int64)
    rows[pair_row.flatten()] = (token * num_heads + head).flatten()
    return rows


def one_kv_head(impl: Any) -> Any:
    """A copy of vLLM's attention implementation that attends over pairs.

    Args:
        impl: of a layer; FlashAttention's and Triton's read the number of heads from attributes.
    """
    pairs = copy.copy(impl)
    pairs.num_heads = impl.num_heads // impl.num_kv_heads
    pairs.num_kv_heads = 1
    return pairs
