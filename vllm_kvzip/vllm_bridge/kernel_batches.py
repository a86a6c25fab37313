"""Attention of a whole batch in one launch of our Triton kernel, compressed requests or not.

The kernel needs to know of a compressed prefix only where each head's pages begin, so there is no
page table to keep: vLLM's block table is read as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.compaction import is_by_dimension, is_by_token
from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.kernels.head_page_attention import head_page_attention
from vllm_kvzip.kernels.page_tables import PagePlace, PageTables
from vllm_kvzip.vllm_bridge.pair_batches import PrefixState, SplitBatch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.attention.backend import CommonAttentionMetadata

    from vllm_kvzip.vllm_bridge.head_page_cache import HeadPageCache


@dataclass(frozen=True)
class KernelBatch:
    """One step's batch as the kernel takes it.

    Attributes:
        pages: keys and values, views ``[num_pages, N, D]`` of the flat pool.
        tables: where each request's KV pairs lie.
        query_start_loc: int32 ``[R + 1]``.
        max_query_len, max_tokens: of any request, or more.
        layer_index: vLLM layer name -> layer of ``tables``.
    """

    pages: tuple[torch.Tensor, torch.Tensor]
    tables: PageTables
    query_start_loc: torch.Tensor
    max_query_len: int
    max_tokens: int
    layer_index: dict[str, int]

    def attend(self, impl: Any, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer for the whole batch.

        Args:
            impl: holds the scale.
            layer: vLLM's attention layer.
            query: ``[num_tokens, H * G, D]``.
            output: ``[num_tokens, H * G * D]`` or like ``query``; written.
        """
        head_page_attention(
            query,
            *self.pages,
            self.query_start_loc,
            self.tables,
            self.layer_index[layer.layer_name],
            impl.scale,
            max_query_len=self.max_query_len,
            max_tokens=self.max_tokens,
            output=output.view(query.shape),
        )


class KernelBatcher:
    """Describes batches to the kernel; stands where :class:`PairBatcher` stands.

    Args:
        cache: what the requests lie in.

    Raises:
        UnsupportedError: for an element order that is no view of ``[N, D]``.
    """

    def __init__(self, cache: HeadPageCache) -> None:
        self._geometry = cache.geometry
        self._place = PagePlace(*cache.pool.strides, cache.pool.first_page)
        keys, values = cache.pages.view(len(cache.pages), 2, -1).unbind(dim=1)
        shape = (cache.geometry.block_size, cache.geometry.head_dim)
        self._pages = (
            _by_token(keys, cache.codec.key_order, *shape),
            _by_token(values, cache.codec.value_order, *shape),
        )
        self._layer_index = cache.layer_index
        self._members: list[PrefixState | None] = []
        self._offsets = self._boundaries = self._slots = torch.empty(0)

    def split(
        self,
        request_ids: list[str],
        common: CommonAttentionMetadata,
        states: Mapping[str, PrefixState],
    ) -> SplitBatch | None:
        """The batch, all of it in one part; None when nobody is compressed."""
        members = [states.get(request_id) for request_id in request_ids]
        if not any(members):
            return None
        if members != self._members:
            self._describe(members, common.seq_lens.device)
        tables = PageTables(
            offsets=self._offsets,
            boundary_blocks=self._boundaries,
            slots=self._slots,
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            place=self._place,
            num_kv_heads=self._geometry.num_kv_heads,
            page_tokens=self._geometry.block_size,
        )
        batch = KernelBatch(
            self._pages,
            tables,
            common.query_start_loc,
            common.max_query_len,
            common.max_seq_len,
            self._layer_index,
        )
        return SplitBatch(batch, None, None)

    def _describe(self, members: list[PrefixState | None], device: torch.device) -> None:
        """A slot for each request of the batch."""
        offsets = torch.zeros(len(members), self._geometry.pages_per_block + 1, dtype=torch.int32)
        boundaries = torch.zeros(len(members), dtype=torch.int32)
        for slot, state in enumerate(members):
            if state is not None:
                offsets[slot, 1:] = state.prefix.pages.flatten().cumsum(0)
                boundaries[slot] = state.plan.num_prefix_blocks
        self._members = members
        self._offsets, self._boundaries = offsets.to(device), boundaries.to(device)
        self._slots = torch.arange(len(members), dtype=torch.int32, device=device)


def _by_token(
    half: torch.Tensor, order: torch.Tensor, block_size: int, head_dim: int
) -> torch.Tensor:
    """``[num_pages, N * D]`` as ``[num_pages, N, D]``, without a copy."""
    if is_by_token(order):
        return half.view(-1, block_size, head_dim)
    if is_by_dimension(order, block_size, head_dim):
        return half.view(-1, head_dim, block_size).transpose(1, 2)
    raise UnsupportedError(
        "The Triton kernel cannot read vLLM's cache here: a page is stored in blocks of elements."
    )
