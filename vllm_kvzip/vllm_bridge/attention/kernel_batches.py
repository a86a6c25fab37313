"""Attention of a batch in one launch of our Triton kernel, compressed requests or not.

The kernel needs to know of a compressed prefix only where each head's pages begin, so there is no
page table to keep: vLLM's block table is read as it is. What it needs is in buffers that never
move, so a CUDA graph that was captured earlier reads the requests of this step. A step writes to
them which request is in which row, and only when that has changed; nothing is read back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.kernels.head_page_attention import head_page_attention
from vllm_kvzip.kernels.page_tables import PagePlace, PageTables
from vllm_kvzip.kernels.quantized_attention import QuantizedPages
from vllm_kvzip.quantization.rotation import hadamard_matrix
from vllm_kvzip.vllm_bridge.attention.batches import PrefixState, SplitBatch
from vllm_kvzip.vllm_bridge.symbols import async_tensor_h2d

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata

_UNCOMPRESSED = 0  # the slot of a prefix of no page


@dataclass(frozen=True)
class KernelBatch:
    """Requests of one step as the kernel takes them.

    Attributes:
        pages: keys and values, views ``[num_pages, N, D]`` of the flat pool.
        tables: where each request's KV pairs are.
        query_start_loc: int32 ``[R + 1]``.
        max_query_len, max_tokens: of any request, or more.
        layer_index: vLLM layer name -> layer of ``tables``.
        quantized: how quantized pages are read; None where there are none.
        scales: of each layer of a cache of 8-bit numbers, float32 ``[3, H]``; None of any other.
    """

    pages: tuple[torch.Tensor, torch.Tensor]
    tables: PageTables
    query_start_loc: torch.Tensor
    max_query_len: int
    max_tokens: int
    layer_index: dict[str, int]
    quantized: QuantizedPages | None = None
    scales: tuple[torch.Tensor, ...] | None = None

    def attend(self, impl: Any, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer for these requests.

        Args:
            impl: holds scale, soft cap and learned logits.
            layer: vLLM's attention layer.
            query: ``[num_tokens, H * G, D]``; rows after the last request are not read.
            output: ``[num_tokens, H * G * D]`` or like ``query``; written.
        """
        index = self.layer_index[layer.layer_name]
        head_page_attention(
            query,
            *self.pages,
            self.query_start_loc,
            self.tables,
            index,
            impl.scale,
            max_query_len=self.max_query_len,
            max_tokens=self.max_tokens,
            quantized=self.quantized,
            stored_scales=None if self.scales is None else self.scales[index],
            sink_logits=impl.sinks,
            soft_cap=impl.logits_soft_cap,
            output=output.view(query.shape),
        )


class KernelBatcher:
    """Describes batches to the kernel; the counterpart of ``HeadSequenceBatcher``.

    A compressed prefix has a slot while its request runs. Of a batch, the kernel serves the
    requests up to the last compressed one; the rest, where vLLM puts what is in prefill, is left to
    vLLM's kernel.

    Args:
        cache: holds the KV pairs of all requests.
        max_requests: most requests of a batch.

    Attributes:
        pages, layer_index, quantized, scales: see :class:`KernelBatch`.
        query_dtype, dtype: of queries and of outputs.
        place: of the pages of a block.
        quantized_split: quantized pages of a head page.
        num_first: see :class:`HeadPageCache`.

    Raises:
        UnsupportedError: for an element order that is no view of ``[N, D]``.
    """

    def __init__(self, cache: HeadPageCache, max_requests: int) -> None:
        geometry, device = cache.geometry, cache.store.device
        self._geometry = geometry
        self.layer_index = cache.layer_index
        pool = cache.pool
        self.place = PagePlace(*pool.strides, pool.first_page, pool.pages_per_head)
        try:
            self.pages = cache.store.views()
        except ValueError as error:
            raise UnsupportedError(f"Our kernel cannot read vLLM's cache here: {error}.") from error
        self.dtype = self.query_dtype = cache.pages.dtype
        self.scales = None
        if cache.scales is not None:
            self.dtype, self.query_dtype = cache.scales.dtype, cache.scales.query_dtype
            self.scales = tuple(cache.scales.factors.transpose(0, 1).contiguous())
        num_slots = 1 + max_requests
        self._offsets = torch.zeros(
            num_slots, geometry.num_heads + 1, dtype=torch.int32, device=device
        )
        self.quantized = _read_quantized(cache, self.dtype)
        self._quantized_offsets = self._key_transforms = None
        self.num_first = cache.num_first
        self.quantized_split = 1
        if cache.quantization is not None:
            self.quantized_split = cache.quantization.split
            self._quantized_offsets = self._offsets.clone()
            rows = 2 + cache.num_first
            shape = (num_slots, geometry.num_heads, rows, geometry.head_dim)
            self._key_transforms = torch.zeros(shape, dtype=torch.float32, device=device)
        self._boundaries = torch.zeros(num_slots, dtype=torch.int32, device=device)
        self._slots = torch.zeros(max_requests, dtype=torch.int32, device=device)
        self._slot_of: dict[PrefixState, int] = {}
        self._members: list[PrefixState | None] = []

    def split(
        self,
        request_ids: list[str],
        common: CommonAttentionMetadata,
        states: Mapping[str, PrefixState],
    ) -> SplitBatch | None:
        """The batch in two parts; None when nobody is compressed.

        Args:
            request_ids: in row order.
            common: vLLM's metadata of the batch.
            states: compressed requests.
        """
        members = list(map(states.get, request_ids))
        while members and members[-1] is None:
            members.pop()
        num_rows = len(members)
        self._place_members(members, states)
        if not num_rows:
            return None
        starts = common.query_start_loc_cpu
        batch = self.batch(common, num_rows, int(starts[: num_rows + 1].diff().max()))
        if num_rows == common.num_reqs:
            return SplitBatch(batch, None, None)
        return SplitBatch(batch, slice(num_rows, None), slice(int(starts[num_rows]), None))

    def batch(
        self, common: CommonAttentionMetadata, num_rows: int, max_query_len: int
    ) -> KernelBatch:
        """The first rows of a batch as they were last placed; those of a dummy are uncompressed."""
        tables = PageTables(
            offsets=self._offsets,
            boundary_pages=self._boundaries,
            slots=self._slots[:num_rows],
            block_table=common.block_table_tensor,
            seq_lens=common.seq_lens,
            place=self.place,
            num_kv_heads=self._geometry.num_kv_heads,
            page_tokens=self._geometry.page_tokens,
            quantized_offsets=self._quantized_offsets,
            key_transforms=self._key_transforms,
            split=self.quantized_split,
        )
        return KernelBatch(
            self.pages,
            tables,
            common.query_start_loc,
            max_query_len,
            common.max_seq_len,
            self.layer_index,
            self.quantized,
            self.scales,
        )

    def _place_members(
        self, members: list[PrefixState | None], states: Mapping[str, PrefixState]
    ) -> None:
        """Write who is in which row, up to the last compressed request."""
        if members == self._members:
            return
        alive = set(states.values())
        self._slot_of = {state: slot for state, slot in self._slot_of.items() if state in alive}
        new = [state for state in members if state is not None and state not in self._slot_of]
        if new:
            for state, slot in zip(new, self._free_slots(len(new), members), strict=True):
                self._write(state, slot)
        slots = [_UNCOMPRESSED if state is None else self._slot_of[state] for state in members]
        slots += [_UNCOMPRESSED] * (len(self._members) - len(members))
        async_tensor_h2d(slots, out=self._slots[: len(slots)])
        self._members = members

    def _free_slots(self, count: int, members: list[PrefixState | None]) -> list[int]:
        """Slots that nobody of the batch uses; requests outside of it lose theirs if need be."""
        num_slots = len(self._offsets) - 1  # without that of no page
        if num_slots - len(self._slot_of) < count:
            in_batch = set(members)
            self._slot_of = {s: slot for s, slot in self._slot_of.items() if s in in_batch}
        taken = set(self._slot_of.values())
        return [slot for slot in range(1, num_slots + 1) if slot not in taken][:count]

    def _write(self, state: PrefixState, slot: int) -> None:
        """Put a prefix in a slot."""
        self._slot_of[state] = slot
        self._offsets[slot].copy_(state.prefix.offsets, non_blocking=True)
        if self._quantized_offsets is not None:
            self._quantized_offsets[slot].copy_(state.prefix.offsets_of(1), non_blocking=True)
        if (transform := state.prefix.key_transform) is not None:
            assert self._key_transforms is not None
            self._key_transforms[slot].copy_(transform.flat.packed, non_blocking=True)
        in_pages = state.plan.num_prefix_blocks * self._geometry.pages_per_head
        self._boundaries[slot].fill_(in_pages)


def _read_quantized(cache: HeadPageCache, dtype: torch.dtype) -> QuantizedPages | None:
    """How the kernel reads the quantized pages of a cache for a model of some dtype."""
    chosen, pages = cache.quantization, cache.pages
    if chosen is None:
        return None
    code_book = None if chosen.code_book is None else chosen.code_book.to(pages.device)
    rotation = None
    if chosen.rotated:
        rotation = hadamard_matrix(cache.geometry.head_dim).to(pages.device, dtype)
    return QuantizedPages(chosen.pages_of(pages), chosen.layout, code_book, rotation)
