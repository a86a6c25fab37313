"""Attention on the CPU over compressed requests that have quantized pages.

Requests with few query tokens, which decode, are attended to together; a request that reads a
prompt after its compressed prefix is attended to head by head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.quantization.reading import PageReader
from vllm_kvzip.storage.tiered_attention import TieredAttention, TierPages, quantized_tokens

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.vllm_bridge.attention.batches import PrefixState
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache

FEW_QUERY_TOKENS = 8
"""Requests with more are attended to one by one."""


@dataclass(frozen=True)
class QuantizedTier:
    """Quantized pages of some requests; each KV head of a request is a head sequence.

    Attributes:
        layers: of each layer, ordered by head sequence ``r * H + h``.
        num_tokens: int64 ``[L, R * H]``, tokens in them.
        transform: ``[L, R * H]``, of their keys; changes nothing where there are none.
    """

    layers: list[TierPages]
    num_tokens: torch.Tensor
    transform: KeyTransform


class TieredReader:
    """Reads either tier of one cache.

    Args:
        cache: with quantized pages.
    """

    def __init__(self, cache: HeadPageCache) -> None:
        assert cache.quantization is not None
        self.geometry = cache.geometry
        self.layer_index = cache.layer_index
        self._store = cache.store
        self._bytes = cache.quantization.pages_of(cache.pages)
        geometry = cache.geometry
        keys = torch.zeros(
            geometry.num_layers, geometry.num_kv_heads, cache.num_first, geometry.head_dim
        )
        self._unchanged = KeyTransform.fit(keys, cache.num_first)
        self._reader = PageReader(cache.quantization.layout)
        self._rotated = cache.quantization.rotated

    def attention(self, layer: int, impl: Any) -> TieredAttention:
        """What attends in one layer, with the softmax scale and the cap of vLLM's ``impl``."""
        return TieredAttention(
            reader=self._reader,
            rotated=self._rotated,
            read_quantized=lambda ids: self._bytes.index_select(0, ids),
            read_full=lambda ids: self._read_full(ids, layer),
            scale=impl.scale,
            soft_cap=impl.logits_soft_cap,
        )

    def _read_full(self, ids: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (len(ids), self.geometry.page_tokens, self.geometry.head_dim)
        store = self._store
        keys, values = store.read_keys(ids[None], layer), store.read_values(ids[None], layer)
        return keys.view(shape), values.view(shape)

    def tier(self, states: Sequence[PrefixState]) -> QuantizedTier | None:
        """Quantized pages of some requests; None when they have none.

        Args:
            states: in the order of the requests.
        """
        geometry, page_tokens = self.geometry, self._reader.layout.page_tokens
        num_layers, num_heads = geometry.num_layers, geometry.num_kv_heads
        num_tokens = torch.zeros(num_layers, len(states), num_heads, dtype=torch.int64)
        parts = []
        ids, layers, owners, first = [], [], [], []
        for number, state in enumerate(states):
            prefix = state.prefix
            parts.append(prefix.key_transform or self._unchanged)
            if prefix.quantized is None:
                continue
            boundary = state.plan.boundary_tokens
            num_tokens[:, number] = quantized_tokens(
                prefix, boundary, geometry.page_tokens, page_tokens
            )
            counts = prefix.quantized.pages.flatten()
            heads = torch.arange(len(counts)).repeat_interleave(counts)
            index = torch.arange(len(heads)) - (counts.cumsum(0) - counts)[heads]
            ids.append(prefix.quantized.page_ids)
            layers.append(heads // num_heads)
            owners.append(number * num_heads + heads % num_heads)
            first.append(index * page_tokens)
        if not ids:
            return None
        by_layer = torch.cat(layers)
        order = by_layer.argsort(stable=True)
        sizes = torch.bincount(by_layer, minlength=num_layers).tolist()
        columns = [torch.cat(column)[order].split(sizes) for column in (ids, owners, first)]
        tiers = [TierPages(*of_layer) for of_layer in zip(*columns, strict=True)]
        return QuantizedTier(tiers, num_tokens.flatten(1), KeyTransform.join(parts))


@dataclass(frozen=True)
class FewQueries:
    """The S requests of a batch with few query tokens, padded to the most of them, W.

    Attributes:
        sequences: int64 ``[S * H]``, which head sequences they are.
        rows: int64 ``[S, W]``, their token rows, padded with the first one.
        is_token: bool ``[S, W]``, False where it is padding.
        later: int64 ``[S, 1, W]``, tokens of the request after each; 0 where there is none.
    """

    sequences: torch.Tensor
    rows: torch.Tensor
    is_token: torch.Tensor
    later: torch.Tensor


@dataclass(frozen=True)
class TieredBatch:
    """The compressed requests of one step, some of which have quantized pages.

    Attributes:
        reader: of their pages.
        tables: int32 ``[L, R * H, W]``, ordinary pages of each head sequence.
        seq_lens: int32 ``[L, R * H]``, tokens in them.
        starts, lengths: int64 ``[R]``, first token row of each request, and how many it has.
        quantized: their quantized pages.
    """

    reader: TieredReader
    tables: torch.Tensor
    seq_lens: torch.Tensor
    starts: torch.Tensor
    lengths: torch.Tensor
    quantized: QuantizedTier

    def attend(self, impl: Any, layer: Any, query: torch.Tensor, output: torch.Tensor) -> None:
        """Attention of one layer; see :class:`~.batches.AttendingBatch`.

        Args:
            impl: holds scale, soft cap and learned logits.
            layer: vLLM's attention layer.
            query: ``[num_tokens, H * G, D]``.
            output: like ``query``; rows of these requests are written.
        """
        index = self.reader.layer_index[layer.layer_name]
        geometry, attention = self.reader.geometry, self.reader.attention(index, impl)
        sinks = None
        if impl.sinks is not None:
            sinks = impl.sinks.float().view(geometry.num_kv_heads, geometry.group_size)
        output = output.view(query.shape)
        if (few := self._few) is not None:
            self._attend_to_few(attention, index, few, query, output, sinks)
        for request in self._many:
            self._attend_to_one(attention, index, request, query, output, sinks)

    @cached_property
    def _few(self) -> FewQueries | None:
        """Requests with few query tokens; None when there are none. The same for all layers."""
        requests = (self.lengths <= FEW_QUERY_TOKENS).nonzero().flatten()
        if not len(requests):
            return None
        num_heads, lengths = self.reader.geometry.num_kv_heads, self.lengths[requests]
        steps = torch.arange(int(lengths.max()))
        is_token = steps < lengths[:, None]
        return FewQueries(
            sequences=(requests[:, None] * num_heads + torch.arange(num_heads)).flatten(),
            rows=self.starts[requests, None] + torch.where(is_token, steps, 0),
            is_token=is_token,
            later=(lengths[:, None] - steps - 1).clamp(min=0)[:, None],
        )

    @cached_property
    def _many(self) -> list[int]:
        """Requests with more."""
        found: list[int] = (self.lengths > FEW_QUERY_TOKENS).nonzero().flatten().tolist()
        return found

    def _attend_to_few(
        self,
        attention: TieredAttention,
        layer: int,
        few: FewQueries,
        query: torch.Tensor,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """All requests with few query tokens; ``sinks`` float32 ``[H, G]``, learned logits."""
        geometry = self.reader.geometry
        num_heads, group, head_dim = geometry.num_kv_heads, geometry.group_size, geometry.head_dim
        sequences, rows, is_token = few.sequences, few.rows, few.is_token
        width = rows.shape[1]
        queries = query[rows].unflatten(2, (num_heads, group)).transpose(1, 2)
        seq_lens = self.seq_lens[layer, sequences].long()
        seen = seq_lens.view(-1, num_heads, 1) - few.later  # [S, H, W]
        attended = attention.attend_rows(
            queries.reshape(len(sequences), width * group, head_dim),
            self._own(self.quantized.layers[layer], sequences),
            self.quantized.num_tokens[layer, sequences],
            self.quantized.transform.at(layer).at(sequences),
            self._full_pages(layer, sequences, seq_lens),
            seen.reshape(len(sequences), width, 1).expand(-1, -1, group).flatten(1),
            None if sinks is None else sinks.repeat(len(rows), width),
        )
        by_token = attended.view(len(rows), num_heads, width, group, head_dim).transpose(1, 2)
        output[rows[is_token]] = by_token.flatten(2, 3)[is_token].to(output.dtype)

    def _attend_to_one(
        self,
        attention: TieredAttention,
        layer: int,
        request: int,
        query: torch.Tensor,
        output: torch.Tensor,
        sinks: torch.Tensor | None,
    ) -> None:
        """A request with many query tokens, KV head by KV head; ``sinks`` as above."""
        geometry = self.reader.geometry
        num_heads, group = geometry.num_kv_heads, geometry.group_size
        start = int(self.starts[request])
        rows = slice(start, start + int(self.lengths[request]))
        tier = self.quantized.layers[layer]
        for head in range(num_heads):
            sequence, heads = request * num_heads + head, slice(head * group, (head + 1) * group)
            num_tokens = int(self.seq_lens[layer, sequence])
            num_pages = -(-num_tokens // geometry.page_tokens)
            attended = attention.attend_causally(
                query[rows, heads].transpose(0, 1),
                tier.ids[tier.owners == sequence],
                int(self.quantized.num_tokens[layer, sequence]),
                self.quantized.transform.at(layer).at(sequence),
                self.tables[layer, sequence, :num_pages].long(),
                num_tokens,
                None if sinks is None else sinks[head],
            )
            output[rows, heads] = attended.transpose(0, 1).to(output.dtype)

    def _own(self, tier: TierPages, sequences: torch.Tensor) -> TierPages:
        """The pages of some head sequences, which are numbered anew."""
        if len(sequences) == self.tables.shape[1]:
            return tier
        number = torch.full((self.tables.shape[1],), -1)
        number[sequences] = torch.arange(len(sequences))
        owners = number[tier.owners]
        mine = owners >= 0
        return TierPages(tier.ids[mine], owners[mine], tier.first[mine])

    def _full_pages(self, layer: int, sequences: torch.Tensor, seq_lens: torch.Tensor) -> TierPages:
        """Ordinary pages of some head sequences."""
        size = self.reader.geometry.page_tokens
        tables = self.tables[layer, sequences]
        columns = torch.arange(tables.shape[1])
        filled = columns < (seq_lens[:, None] + size - 1) // size
        owners, column = filled.nonzero(as_tuple=True)
        return TierPages(tables[filled].long(), owners, column * size)
