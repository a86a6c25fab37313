"""Attention on the CPU over head pages, with vLLM's own kernel.

A (request, KV head) pair of a compressed request is a sequence of its own: one KV head, as many
query heads as the query group has, a page table of its own, a length of its own. vLLM's paged
kernel attends over such pairs when it is given the flat pool of head pages as its cache. Requests
that are not compressed take vLLM's path unchanged; a batch without any compressed request costs a
dictionary look-up per request.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
    envs,
)
from vllm_kvzip.vllm_bridge.symbols import custom_ops as ops

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


@dataclass
class PairBatch:
    """The compressed requests of one step as (request, KV head) pairs.

    Attributes:
        pages: the flat pool, keys and values: two views ``[num_pages, 1, N, D]``.
        tables: int32 ``[L, R * H, W]``, head page ids of each pair.
        seq_lens: int32 ``[L, R * H]``, tokens each pair attends over.
        query_start_loc: int32 ``[R * H + 1]``, in rows of the pair batch.
        pair_rows: int64 ``[sum of query lengths * H]``: pair row -> ``token * H + head``; None when
            every token of the batch is one decode step of a compressed request, in order.
        num_kv_heads, group_size, head_dim: H, G, D.
        layer_index: vLLM layer name -> layer of ``tables``.
    """

    pages: tuple[torch.Tensor, torch.Tensor]
    tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    pair_rows: torch.Tensor | None
    num_kv_heads: int
    group_size: int
    head_dim: int
    layer_index: dict[str, int]
    isa: str

    def attend(
        self, impl: HeadPageCPUImpl, layer: Any, query: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Attention of one layer for the compressed requests.

        Args:
            impl: holds scale and soft cap.
            layer: vLLM's attention layer.
            query: ``[num_tokens, H * G, D]`` of the whole batch.
            output: like ``query``; rows of compressed requests are written, others left alone.
        """
        index = self.layer_index[layer.layer_name]
        num_tokens = query.shape[0]
        pair_shape = (num_tokens * self.num_kv_heads, self.group_size, self.head_dim)
        pair_query = query.reshape(pair_shape)
        pair_output = output.view(pair_shape)
        if self.pair_rows is None:
            target = pair_output
        else:
            pair_query = pair_query.index_select(0, self.pair_rows)
            target = torch.empty_like(pair_query)
        seq_lens = self.seq_lens[index]
        key_pages, value_pages = self.pages
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=seq_lens.shape[0],
            num_heads=self.group_size,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=query.dtype,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        ops.cpu_attention_with_kv_cache(
            query=pair_query,
            key_cache=key_pages,
            value_cache=value_pages,
            output=target,
            query_start_loc=self.query_start_loc,
            seq_lens=seq_lens,
            scale=impl.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.tables[index],
            softcap=impl.logits_soft_cap,
            scheduler_metadata=metadata,
            s_aux=None,
        )
        if self.pair_rows is not None:
            pair_output.index_copy_(0, self.pair_rows, target)


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
