"""Attention over head pages by vLLM's own GPU kernel: each KV head of a request is a sequence.

The pool of head pages is the kernel's cache, with one KV head; one launch per step writes the page
tables and lengths of these head sequences for all layers. The tables take 4 bytes for every page of
every head sequence, so large batches of long requests are left to our own kernel, which needs none.
So are models with learned attention sinks: vLLM's kernels take them by query head, the same for all
sequences.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.kernels.flat_tables import flatten_tables
from vllm_kvzip.vllm_bridge.symbols import async_tensor_h2d

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatch
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata

MOST_TABLE_BYTES = 256 * 2**20
TILE_TOKENS = 128


@dataclass(frozen=True)
class StockHeadSequences:
    """Requests of one step as head sequences.

    Their tables are written when the first layer attends, so not in a step that replays a CUDA
    graph.

    Attributes:
        batch: as our kernel takes them.
        pages: the flat pool as vLLM's kernel wants a cache, ``[num_pages, 1, N, 2 * D]``.
        metadata: vLLM's, of any batch of this engine; what it says of the batch is replaced.
        common: vLLM's metadata of the whole batch.
    """

    batch: KernelBatch
    pages: torch.Tensor
    metadata: Any
    common: CommonAttentionMetadata

    def attend(self, impl: Any, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer for these requests; shapes as in :class:`KernelBatch`."""
        num_heads = self.batch.tables.num_kv_heads
        num_tokens, num_query_heads, head_dim = query.shape
        shape = (num_tokens * num_heads, num_query_heads // num_heads, head_dim)
        rows, rows_out = query.reshape(shape), output.view(shape)
        metadata = self.by_layer[self.batch.layer_index[layer.layer_name]]
        if self.batch.max_query_len == 1:  # one token each: the order is the same
            impl.attend_over_head_sequences(layer, rows, self.pages, metadata, rows_out)
            return
        target = torch.empty_like(rows)
        impl.attend_over_head_sequences(
            layer, rows[self.sequence_rows], self.pages, metadata, target
        )
        rows_out.index_copy_(0, self.sequence_rows, target)

    @cached_property
    def _starts(self) -> torch.Tensor:
        """Query starts of the requests, int64 on the CPU."""
        return self.common.query_start_loc_cpu[: len(self.batch.tables.slots) + 1].long()

    @cached_property
    def sequence_rows(self) -> torch.Tensor:
        """Row of a head sequence -> ``token * H + head``, int64."""
        rows = _sequence_rows(self._starts, self.batch.tables.num_kv_heads)
        return async_tensor_h2d(rows, device=self.pages.device)

    @cached_property
    def by_layer(self) -> list[Any]:
        """vLLM's metadata of the head sequences, for each layer."""
        tables, device = self.batch.tables, self.pages.device
        num_heads = tables.num_kv_heads
        num_sequences = len(tables.slots) * num_heads
        shape = (tables.num_layers, num_sequences, _width(self.batch))
        flat = torch.empty(shape, dtype=torch.int32, device=device)
        lengths = torch.empty(shape[:2], dtype=torch.int32, device=device)
        flatten_tables(tables, flat, lengths)
        starts = torch.zeros(num_sequences + 1, dtype=torch.int32)
        starts[1:] = self._starts.diff().repeat_interleave(num_heads).cumsum(0)
        shared = {
            "num_actual_tokens": int(self._starts[-1]) * num_heads,
            "max_query_len": self.batch.max_query_len,
            "query_start_loc": async_tensor_h2d(starts, device=device),
            "max_seq_len": self.batch.max_tokens,
            "scheduler_metadata": None,
            "slot_mapping": None,
        }
        if hasattr(self.metadata, "seq_threshold_3D"):
            shared["seq_threshold_3D"] = 0  # its scratch for split sequences has room for requests
        return [
            replace(self.metadata, block_table=table, seq_lens=layer_lengths, **shared)
            for table, layer_lengths in zip(flat, lengths, strict=True)
        ]


def fits(batch: KernelBatch) -> bool:
    """Whether the tables of a batch are small enough to be written."""
    num_sequences = len(batch.tables.slots) * batch.tables.num_pairs
    return 4 * num_sequences * _width(batch) <= MOST_TABLE_BYTES


def _width(batch: KernelBatch) -> int:
    """Columns of a table: whole tiles, because vLLM's Triton kernel reads such."""
    return -(-batch.max_tokens // TILE_TOKENS) * (TILE_TOKENS // batch.tables.page_tokens)


def _sequence_rows(starts: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Row of a head sequence -> ``token * H + head``, int64; ordered by request, head, token."""
    lengths = starts.diff()
    requests = torch.arange(len(lengths)).repeat_interleave(lengths)
    first, length = starts[requests][:, None], lengths[requests][:, None]
    token, head = torch.arange(len(requests))[:, None], torch.arange(num_heads)
    sequence_row = first * num_heads + head * length + token - first
    rows = torch.empty(sequence_row.numel(), dtype=torch.int64)
    rows[sequence_row.flatten()] = (token * num_heads + head).flatten()
    return rows


def one_kv_head(impl: Any) -> Any:
    """A copy of vLLM's attention implementation that attends over head sequences.

    Args:
        impl: of a layer; FlashAttention's and Triton's read the number of heads from attributes.
    """
    of_sequences = copy.copy(impl)
    of_sequences.num_heads = impl.num_heads // impl.num_kv_heads
    of_sequences.num_kv_heads = 1
    return of_sequences
