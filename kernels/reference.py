"""Plain-torch references of the kernels: slow, literal, and without Triton."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .page_tables import PageTables


@dataclass(frozen=True)
class DecodedPages:
    """The quantized tier of a pool, decoded page by page.

    Attributes:
        keys, values: ``[P * S, Q, D]``, as the pages hold them, so rotated where they are.
        rotation: ``[D, D]``, by whose transpose keys and values were multiplied; None: by nothing.
        transforms: ``[slots, L * H, 2 + W, D]``, what keys lack; see ``PageTables``.
    """

    keys: torch.Tensor
    values: torch.Tensor
    rotation: torch.Tensor | None
    transforms: torch.Tensor

    def rows(
        self, page_ids: torch.Tensor, num_tokens: int, slot: int, pair: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of some pages' first tokens as they were, ``[num_tokens, D]``."""
        found = [gather_pages(half, page_ids, num_tokens) for half in (self.keys, self.values)]
        if self.rotation is not None:
            found = [half @ self.rotation for half in found]
        mean, scale, *first = self.transforms[slot, pair]
        means = mean.repeat(num_tokens, 1)
        for number, own in enumerate(first[:num_tokens]):
            means[number] = own
        return found[0] * scale + means, found[1]


def dealt_pages(tables: PageTables, request: int, index: torch.Tensor) -> torch.Tensor:
    """Page ids, int64, of the pages number ``index`` of a request's prefix; see ``PageTables``."""
    place = tables.place
    row = tables.block_table[request].long()
    of_layer = tables.num_kv_heads * place.pages_per_head
    of_block = tables.num_layers * of_layer
    local = index % of_block
    owner = local // of_layer * place.layer_stride + local % of_layer
    return row[index // of_block] * place.block_stride + owner + place.first_page


def pages_of(tables: PageTables, layer: int, request: int, head: int) -> tuple[torch.Tensor, int]:
    """Full-precision pages that one KV head of one layer of one request attends over.

    Returns:
        int64 ``[pages]``, page ids in the order of positions, and the tokens in them; the last
        page may be part full.
    """
    slot, place = int(tables.slots[request]), tables.place
    pair = layer * tables.num_kv_heads + head
    begin, end = tables.offsets[slot, pair : pair + 2].tolist()
    boundary = int(tables.boundary_pages[slot])
    tail_tokens = int(tables.seq_lens[request]) - boundary * tables.page_tokens
    num_tail = -(-tail_tokens // tables.page_tokens)
    per_head = place.pages_per_head
    number = torch.arange(boundary, boundary + num_tail, device=tables.block_table.device)
    blocks = tables.block_table[request].long()[number // per_head]
    own = layer * place.layer_stride + head * per_head + number % per_head
    tail = blocks * place.block_stride + own + place.first_page
    dealt = dealt_pages(tables, request, torch.arange(begin, end, device=tail.device))
    pages = torch.cat([dealt, tail])
    return pages, (end - begin) * tables.page_tokens + tail_tokens


def quantized_pages_of(
    tables: PageTables, layer: int, request: int, head: int, quantized_page_tokens: int
) -> tuple[torch.Tensor, int]:
    """As :func:`pages_of` for the quantized tier, whose pages hold ``quantized_page_tokens``.

    The last pages may be part full or empty.
    """
    if tables.quantized_offsets is None:
        return torch.zeros(0, dtype=torch.int64, device=tables.block_table.device), 0
    slot = int(tables.slots[request])
    pair = layer * tables.num_kv_heads + head
    first, last = tables.offsets[slot, pair : pair + 2].tolist()
    begin, end = tables.quantized_offsets[slot, pair : pair + 2].tolist()
    room = (int(tables.boundary_pages[slot]) - (last - first)) * tables.page_tokens
    num_tokens = max(0, min((end - begin) * quantized_page_tokens, room))
    index = torch.arange(begin, end, device=tables.block_table.device)
    pages = dealt_pages(tables, request, index // tables.split)
    return pages * tables.split + index % tables.split, num_tokens


def gather_pages(pages: torch.Tensor, page_ids: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The first ``num_tokens`` rows of some pages.

    Args:
        pages: ``[P, N, D]``.
        page_ids: int64 ``[n]``.
        num_tokens: how many rows.

    Returns:
        ``[num_tokens, D]``, a copy.
    """
    return pages[page_ids].flatten(0, 1)[:num_tokens]


def cap_logits_reference(logits: torch.Tensor, soft_cap: float | None) -> torch.Tensor:
    """See ``cap_logits``."""
    return soft_cap * (logits / soft_cap).tanh() if soft_cap else logits


def head_page_attention_reference(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    query_start_loc: torch.Tensor,
    tables: PageTables,
    layer: int,
    scale: float,
    decoded: DecodedPages | None = None,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Attention pair by pair, in the dtype of its inputs; see ``head_page_attention``.

    Args:
        query: ``[tokens, H * G, D]``, the last tokens of each request.
        key_pages, value_pages: ``[P, N, D]``.
        query_start_loc: int32 ``[R + 1]``.
        tables: where each request's KV pairs lie.
        layer: which layer's pages.
        scale: softmax scale.
        decoded: the pool's pages as quantized ones, if ``tables`` has such a tier.
        sink_logits: ``[H * G]``, see ``head_page_attention``.
        soft_cap: likewise.

    Returns:
        like ``query``.
    """
    output = torch.empty_like(query)
    starts = query_start_loc.tolist()
    group = query.shape[1] // tables.num_kv_heads
    for request, (first, end) in enumerate(itertools.pairwise(starts)):
        for head in range(tables.num_kv_heads):
            ids, num_tokens = pages_of(tables, layer, request, head)
            keys = gather_pages(key_pages, ids, num_tokens)
            values = gather_pages(value_pages, ids, num_tokens)
            if decoded is not None:
                page_tokens = decoded.keys.shape[1]
                more = quantized_pages_of(tables, layer, request, head, page_tokens)
                slot, pair = int(tables.slots[request]), layer * tables.num_kv_heads + head
                first_keys, first_values = decoded.rows(*more, slot, pair)
                keys, values = torch.cat([first_keys, keys]), torch.cat([first_values, values])
                num_tokens = len(keys)
            heads = slice(head * group, (head + 1) * group)
            logits = torch.einsum("qgd,kd->gqk", query[first:end, heads], keys) * scale
            logits = cap_logits_reference(logits, soft_cap)
            seen = num_tokens - (end - first) + torch.arange(end - first, device=keys.device)
            future = torch.arange(num_tokens, device=keys.device) > seen[:, None]
            logits = logits.masked_fill(future, float("-inf"))
            if sink_logits is not None:
                sink = sink_logits[heads, None, None].expand(-1, end - first, 1)
                logits = torch.cat([logits, sink.to(logits.dtype)], dim=-1)
            weights = logits.softmax(dim=-1)[..., :num_tokens]
            output[first:end, heads] = torch.einsum("gqk,kd->qgd", weights, values)
    return output


def compact_pages_reference(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    source_pages: torch.Tensor,
    positions: torch.Tensor,
    page_heads: torch.Tensor,
    target_pages: torch.Tensor,
) -> None:
    """Copies with torch's own indexing; see ``compact_pages``."""
    page_tokens = key_pages.shape[1]
    heads = page_heads.long().repeat_interleave(page_tokens)
    index = positions.long()
    pages = source_pages[heads, index // page_tokens].long()
    for half in (key_pages, value_pages):
        kept = half[pages, index % page_tokens]
        half[target_pages.long()] = kept.view(-1, page_tokens, half.shape[2])


def column_maximum_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    log_normaliser: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Scores from the whole attention matrix, in its inputs' dtype; see ``column_maximum``."""
    logits = cap_logits_reference(torch.bmm(queries, keys.transpose(1, 2)) * scale, soft_cap)
    return (logits - log_normaliser[:, :, None]).amax(dim=1).exp().clamp(max=1.0)


def flatten_tables_reference(tables: PageTables, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tables pair by pair, int32 ``[L, R * H, width]``, and lengths; see ``flatten_tables``."""
    num_layers, num_heads, num_requests = tables.num_layers, tables.num_kv_heads, len(tables.slots)
    flat = torch.zeros(num_layers, num_requests * num_heads, width, dtype=torch.int32)
    lengths = torch.zeros(num_layers, num_requests * num_heads, dtype=torch.int32)
    for layer in range(num_layers):
        for request in range(num_requests):
            for head in range(num_heads):
                pages, num_tokens = pages_of(tables, layer, request, head)
                row = request * num_heads + head
                flat[layer, row, : len(pages)] = pages.to(torch.int32)
                lengths[layer, row] = num_tokens
    return flat, lengths
