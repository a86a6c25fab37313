"""Attention on the CPU over head pages: what vLLM's own backend, builder and implementation become.

Compressed requests are attended to by vLLM's own kernel too, see :mod:`.head_sequence_batches`.
Requests that are not compressed take vLLM's path unchanged; a batch without any compressed request
costs a dictionary look-up per request.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.vllm_bridge.attention.attention_layer import HeadPageLayer
from vllm_kvzip.vllm_bridge.attention.metadata_builder import HeadPageBuilder
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_attention
from vllm_kvzip.vllm_bridge.symbols import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.attention.batches import SplitBatch
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata


class HeadPageCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with a builder and an implementation that know head pages."""

    @staticmethod
    def get_impl_cls() -> type[HeadPageCPUImpl]:
        return HeadPageCPUImpl

    @staticmethod
    def get_builder_cls() -> type[HeadPageCPUBuilder]:
        return HeadPageCPUBuilder


class HeadPageCPUBuilder(HeadPageBuilder, CPUAttentionMetadataBuilder):
    """Builds vLLM's metadata, and what is done for compressed requests."""

    def stock_metadata(self, common: CommonAttentionMetadata) -> CPUAttentionMetadata:
        """See :class:`HeadPageBuilder`; without vLLM's plan of how threads share the work."""
        return CPUAttentionMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            max_seq_len=common.max_seq_len,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            scheduler_metadata=None,
        )

    def dense_requests(
        self, common: CommonAttentionMetadata, split: SplitBatch
    ) -> CommonAttentionMetadata | None:
        """See :class:`HeadPageBuilder`; they can be in any rows."""
        if split.dense_rows is None:
            return None
        return _subset(common, torch.arange(common.num_reqs)[split.dense_rows])


class HeadPageCPUImpl(HeadPageLayer, CPUAttentionBackendImpl):
    """vLLM's CPU attention, and ours for compressed requests."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_attention(self)


def _subset(common: CommonAttentionMetadata, rows: torch.Tensor) -> CommonAttentionMetadata:
    """The metadata of some requests of a batch, as if they were alone.

    Args:
        common: metadata of the whole batch.
        rows: int64, ascending rows to keep.
    """
    lengths = common.query_start_loc.diff()[rows]
    starts = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=starts[1:])
    seq_lens = common.seq_lens[rows]
    return replace(
        common,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        num_reqs=len(rows),
        num_actual_tokens=int(starts[-1]),
        max_query_len=int(lengths.max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=common.block_table_tensor[rows],
    )
