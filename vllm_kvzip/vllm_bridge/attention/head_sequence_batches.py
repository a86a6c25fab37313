"""Compressed requests of a step as vLLM's CPU kernel takes them: as head sequences.

A head sequence is one KV head of one request. For the kernel it is a sequence with one KV head, as
many query heads as the query group has, a page table of its own and a length of its own. The kernel
attends over head sequences when it is given the flat pool of head pages as its cache.

Where a model has learned a logit of each query head that joins its softmax, the kernel is called
once for each KV head: it takes such logits by query head, the same for all sequences of a call.

Most steps decode one token of the same requests as the step before. So what follows from who is in
the batch is kept until that changes; each step adds lengths to it, and blocks that are new.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.storage.head_pages import HeadPageTable
from vllm_kvzip.vllm_bridge.attention.batches import SplitBatch
from vllm_kvzip.vllm_bridge.attention.tiered_batches import QuantizedTier, TieredBatch, TieredReader
from vllm_kvzip.vllm_bridge.symbols import custom_ops as ops
from vllm_kvzip.vllm_bridge.symbols import envs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_kvzip.vllm_bridge.attention.batches import PrefixState
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata


@dataclass(frozen=True)
class _Call:
    """What the kernel attends over in one call.

    Attributes:
        sequences: which head sequences.
        query_start_loc: int32, first row of each of them in this call.
        rows: int64, row of the call -> ``token * H + head``; None: it has all rows, in order.
    """

    sequences: slice
    query_start_loc: torch.Tensor
    rows: torch.Tensor | None


@dataclass
class HeadSequenceBatch:
    """The compressed requests of one step as head sequences.

    Attributes:
        pages: the flat pool, keys and values: two views ``[num_pages, 1, N, D]``.
        tables: int32 ``[L, R * H, W]``, head page ids of each head sequence.
        seq_lens: int32 ``[L, R * H]``, tokens that each of them attends over.
        query_start_loc: int32 ``[R * H + 1]``, first row of each of them in this batch.
        sequence_rows: int64 ``[sum of query lengths * H]``, row of this batch -> ``token * H +
            head``; None when every token of the step is one of a compressed request that decodes,
            in order.
        num_kv_heads, group_size, head_dim: H, G, D.
        layer_index: vLLM layer name -> layer of ``tables``.
    """

    pages: tuple[torch.Tensor, torch.Tensor]
    tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    sequence_rows: torch.Tensor | None
    num_kv_heads: int
    group_size: int
    head_dim: int
    layer_index: dict[str, int]
    isa: str

    def attend(self, impl: Any, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer for the compressed requests.

        Args:
            impl: holds scale, soft cap and learned logits.
            layer: vLLM's attention layer.
            query: ``[num_tokens, H * G, D]`` of the whole batch.
            output: like ``query``; rows of compressed requests are written, others left alone.
        """
        index = self.layer_index[layer.layer_name]
        shape = (query.shape[0] * self.num_kv_heads, self.group_size, self.head_dim)
        rows, rows_out = query.reshape(shape), output.view(shape)
        if impl.sinks is None:
            self._call(impl, index, self._all, rows, rows_out, None)
            return
        sinks = impl.sinks.view(self.num_kv_heads, self.group_size)
        if sinks.dtype not in (torch.bfloat16, torch.float32):
            sinks = sinks.float()  # as vLLM does
        for part, own in zip(self._by_head, sinks, strict=True):
            self._call(impl, index, part, rows, rows_out, own)

    @property
    def _all(self) -> _Call:
        return _Call(slice(None), self.query_start_loc, self.sequence_rows)

    @cached_property
    def _by_head(self) -> list[_Call]:
        """The head sequences of each KV head; the same for all layers."""
        num_heads, rows = self.num_kv_heads, self.sequence_rows
        starts = self.query_start_loc[::num_heads] // num_heads
        if rows is None:
            rows = torch.arange(int(self.query_start_loc[-1]))
        return [
            _Call(slice(head, None, num_heads), starts, rows[rows % num_heads == head])
            for head in range(num_heads)
        ]

    def _call(
        self,
        impl: Any,
        index: int,
        call: _Call,
        rows: torch.Tensor,
        rows_out: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """Attention of some head sequences in layer ``index``; ``sinks`` ``[G]``."""
        target = rows_out
        if call.rows is not None:
            rows = rows.index_select(0, call.rows)
            target = torch.empty_like(rows)
        seq_lens = self.seq_lens[index, call.sequences].contiguous()
        key_pages, value_pages = self.pages
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=seq_lens.shape[0],
            num_heads=self.group_size,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=rows.dtype,
            query_start_loc=call.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        ops.cpu_attention_with_kv_cache(
            query=rows,
            key_cache=key_pages,
            value_cache=value_pages,
            output=target,
            query_start_loc=call.query_start_loc,
            seq_lens=seq_lens,
            scale=impl.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.tables[index, call.sequences].contiguous(),
            softcap=impl.logits_soft_cap,
            scheduler_metadata=metadata,
            s_aux=sinks,
        )
        if call.rows is not None:
            rows_out.index_copy_(0, call.rows, target)


@dataclass
class _Members:
    """What follows from who is in the batch.

    Attributes:
        request_ids: of the whole batch, in row order.
        found: the state of each of them; None of those that are not compressed.
        states: of the compressed ones.
        rows: int64 ``[R]``, their rows.
        dense_rows: int64, the other rows; None when there are none.
        table: their page table.
        surplus: int32 ``[L, R, H]``, tokens a head sequence attends over beyond its request's
            length; negative where something was evicted.
        room: int32 ``[R]``, length up to which the table knows a request's blocks.
        quantized: quantized pages of the compressed ones; None when they have none.
        decode: query starts, sequence rows and dense token rows of steps with one token per
            request.
    """

    request_ids: list[str]
    found: tuple[PrefixState | None, ...]
    states: tuple[PrefixState, ...]
    rows: torch.Tensor
    dense_rows: torch.Tensor | None
    table: HeadPageTable
    surplus: torch.Tensor
    room: torch.Tensor
    quantized: QuantizedTier | None
    decode: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None] | None = None


class HeadSequenceBatcher:
    """Splits batches into compressed and other requests; see the module docstring.

    Args:
        cache: holds the KV pairs of all requests.
        isa: vLLM's name of the CPU kernel variant that wrote it.
    """

    def __init__(self, cache: HeadPageCache, isa: str) -> None:
        self._cache = cache
        self._isa = isa
        self._geometry = geometry = cache.geometry
        shape = (-1, 1, 2 * geometry.page_tokens, geometry.head_dim)
        halves = cache.pages.view(shape).chunk(2, dim=2)
        self._page_halves = (halves[0], halves[1])
        self._members: _Members | None = None
        self._reader = TieredReader(cache) if cache.quantization else None

    def split(
        self,
        request_ids: list[str],
        common: CommonAttentionMetadata,
        states: Mapping[str, PrefixState],
    ) -> SplitBatch | None:
        """The batch in two parts; None when nobody is compressed.

        Args:
            request_ids: in row order.
            common: vLLM's metadata of the batch; tensors are on the CPU.
            states: of compressed requests, by id; others may be named as well.
        """
        found = tuple(map(states.get, request_ids))
        members = self._members
        if members is None or members.found != found or members.request_ids != request_ids:
            if not any(found):
                return None
            members = self._members = self._describe(request_ids, found)
        lengths = common.seq_lens[: len(request_ids)]
        if members.dense_rows is not None:
            lengths = lengths[members.rows]
        self._append_tails(members, lengths, common.block_table_tensor)
        seq_lens = (members.surplus + lengths[None, :, None]).flatten(1)
        if members.quantized is not None:
            return self._in_tiers(members, common, seq_lens)
        if common.max_query_len == 1:
            if members.decode is None:
                members.decode = self._queries(members, common.query_start_loc, single=True)
            starts, sequence_rows, dense_tokens = members.decode
        else:
            starts, sequence_rows, dense_tokens = self._queries(
                members, common.query_start_loc, single=False
            )
        geometry = self._geometry
        batch = HeadSequenceBatch(
            pages=self._page_halves,
            tables=members.table.table,
            seq_lens=seq_lens,
            query_start_loc=starts,
            sequence_rows=sequence_rows,
            num_kv_heads=geometry.num_kv_heads,
            group_size=geometry.group_size,
            head_dim=geometry.head_dim,
            layer_index=self._cache.layer_index,
            isa=self._isa,
        )
        return SplitBatch(batch, members.dense_rows, dense_tokens)

    def _in_tiers(
        self, members: _Members, common: CommonAttentionMetadata, seq_lens: torch.Tensor
    ) -> SplitBatch:
        """A batch in which somebody has quantized pages."""
        assert members.quantized is not None and self._reader is not None
        starts = common.query_start_loc
        batch = TieredBatch(
            reader=self._reader,
            tables=members.table.table,
            seq_lens=seq_lens,
            starts=starts[members.rows].long(),
            lengths=starts.diff()[members.rows].long(),
            quantized=members.quantized,
        )
        dense_tokens = None
        if members.dense_rows is not None:
            dense_tokens = torch.cat(_token_rows(starts, members.dense_rows))
        return SplitBatch(batch, members.dense_rows, dense_tokens)

    def _describe(self, request_ids: list[str], found: tuple[PrefixState | None, ...]) -> _Members:
        geometry = self._geometry
        rows = [row for row, state in enumerate(found) if state is not None]
        states = tuple(state for state in found if state is not None)
        dense_rows = None
        if len(rows) < len(request_ids):
            others = torch.ones(len(request_ids), dtype=torch.bool)
            others[rows] = False
            dense_rows = others.nonzero().flatten()
        boundaries = torch.tensor([s.plan.boundary_tokens for s in states], dtype=torch.int32)
        earlier = self._members
        before = {state: number for number, state in enumerate(earlier.states if earlier else ())}
        table = HeadPageTable.build(
            [state.prefix for state in states],
            self._cache.pool,
            earlier=earlier.table if earlier else None,
            stay={row: before[state] for row, state in enumerate(states) if state in before},
        )
        tails = torch.tensor([table.num_tail_blocks(slot) for slot in range(len(states))])
        kept = table.compressed_pages.view(geometry.num_layers, len(states), -1)
        surplus = kept.to(torch.int32) * geometry.page_tokens - boundaries[:, None]
        return _Members(
            request_ids=list(request_ids),
            found=found,
            states=states,
            rows=torch.tensor(rows),
            dense_rows=dense_rows,
            table=table,
            surplus=surplus,
            room=boundaries + tails.to(torch.int32) * geometry.block_size,
            quantized=self._reader.tier(states) if self._reader else None,
        )

    def _append_tails(
        self, members: _Members, lengths: torch.Tensor, block_table: torch.Tensor
    ) -> None:
        """Put blocks that are new since the last step into the page table."""
        slots = (lengths > members.room).nonzero().flatten()
        if not len(slots):
            return
        block_size = self._geometry.block_size
        known = members.room[slots].long() // block_size
        new = (lengths[slots].long() + block_size - 1) // block_size - known
        for count in new.unique().tolist():
            alike = new == count
            some, columns = slots[alike], known[alike][:, None] + torch.arange(count)
            blocks = block_table[members.rows[some][:, None], columns]
            members.table.append_tails(some, blocks)
            members.room[some] = ((known[alike] + count) * block_size).to(members.room.dtype)

    def _queries(
        self, members: _Members, query_starts: torch.Tensor, *, single: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Query starts of the head sequences, their rows, and the token rows of the other requests.

        ``single``: every request of the batch has one token.
        """
        num_heads = self._geometry.num_kv_heads
        lengths = query_starts.diff()[members.rows]
        starts = torch.zeros(len(members.rows) * num_heads + 1, dtype=torch.int32)
        torch.cumsum(lengths.repeat_interleave(num_heads), 0, out=starts[1:])
        dense_tokens = None
        if members.dense_rows is not None:
            dense_tokens = torch.cat(_token_rows(query_starts, members.dense_rows))
        elif single:
            return starts, None, None
        heads = torch.arange(num_heads)[:, None]
        tokens = _token_rows(query_starts, members.rows)
        sequence_rows = torch.cat([(rows * num_heads + heads).flatten() for rows in tokens])
        return starts, sequence_rows, dense_tokens


def _token_rows(starts: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
    """For each row of ``rows``, the int64 token rows that ``starts`` gives it."""
    bounds = starts.tolist()
    return [torch.arange(bounds[row], bounds[row + 1]) for row in rows.tolist()]
