"""Attention over head pages: every (request, KV head) pair has pages and a length of its own.

One kernel serves decode, speculative decoding and the continuation of a chunked prefill, compressed
and other requests in one batch. The query heads of a KV head are rows of one tile, so that keys
and values are read once for all of them (grouped-query attention), and a long pair is split into
runs of tokens that work side by side; a second kernel joins their softmaxes by the log of their
normalisers, as in FlashDecoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html). A pair
with few kept tokens has few runs: the work follows what is kept, head by head.

Where a prefix has a quantized tier, a pair's tokens are those of its quantized pages first, then
those of its other pages. Both are one softmax; ``quantized_attention.py`` has the first part.

A model may cap its logits, and may have learned a logit of each query head that joins the softmax
and has no value. The first run of a pair counts it, so that the sum of all runs has it once.

A cache of 8-bit numbers (``--kv-cache-dtype fp8``) is read as it is stored: what its numbers are
multiplied with goes into the scale of the logits and the end of the weighted sum, once a program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from .launching import INTERPRETED, dot_precision
from .online_softmax import (
    LOG2_E,
    cap_logits,
    join_runs,
    run_length,
    start_softmax,
    weigh_tile,
)
from .page_tables import find_pages, find_pair, find_quantized
from .quantized_attention import attend_quantized, tier_arguments
from .tile_sizes import LEAST_RUN, MOST_RUNS, choose_num_runs, choose_tile, num_processors

if TYPE_CHECKING:
    from .page_tables import PageTables
    from .quantized_attention import QuantizedPages

COMPUTE_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def find_tile(query_start_loc, program, num_requests, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Which request a program serves, and which of its tiles; there may be no such tile.

    Request ``i`` has its tiles from number ``query_start_loc[i] * GROUP // ROWS + i`` on. That
    leaves room for all of them, and a long request makes no programs for the short ones beside it.
    """
    low = program * 0
    high = low + num_requests - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(query_start_loc + middle) * GROUP // ROWS + middle <= program:
            low = middle
        else:
            high = middle - 1
    return low, program - (tl.load(query_start_loc + low) * GROUP // ROWS + low)


@triton.jit(
    do_not_specialize=[
        "first_pair",
        "layer_page",
        "first_page",
        "num_requests",
        "run_stride",
        "sums_run_stride",
        "stored_scales",  # of some layers they are aligned, of others not
        "sink_logits",
    ]
)
def attend_runs(
    query, key_pages, value_pages, output, log_sums,
    offsets, boundaries, slots, seq_lens, block_table, query_start_loc,
    log2_scale, num_requests, first_pair, layer_page, first_page, layer_stride, block_stride,
    query_token_stride, query_head_stride,
    key_page_stride, key_token_stride, key_dim_stride,
    value_page_stride, value_token_stride, value_dim_stride,
    run_stride, output_token_stride, output_head_stride, sums_run_stride, sums_token_stride,
    table_stride,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, N: tl.constexpr, PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, LEAST: tl.constexpr,
    ONE_TILE: tl.constexpr, ONE_RUN: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    quantized_offsets=None, quantized_pages=None, code_book=None, rotation=None,
    key_transforms=None, quantized_stride=None, Q: tl.constexpr = None,
    SPLIT: tl.constexpr = None, FIRST: tl.constexpr = None,
    QUANTIZED_TOKENS: tl.constexpr = None,
    KEY_LOAD: tl.constexpr = None,
    KEY_CODES: tl.constexpr = None, KEY_GROUP: tl.constexpr = None,
    KEY_SCALES: tl.constexpr = None, KEY_BLOCK: tl.constexpr = None,
    VALUE_LOAD: tl.constexpr = None,
    VALUE_CODES: tl.constexpr = None, VALUE_GROUP: tl.constexpr = None,
    VALUE_SCALES: tl.constexpr = None, VALUE_BLOCK: tl.constexpr = None,
    stored_scales=None, COMPUTE: tl.constexpr = None,
    sink_logits=None, log2_cap=None,
):  # fmt: skip
    """One tile of query rows of one pair over one run of tokens.

    Grid ``(tiles of all requests, runs, H)``; a tile each when ``ONE_TILE``. A row is a (token,
    query head of the group). Without ``quantized_offsets`` nothing of that tier is compiled,
    nothing of 8-bit numbers, which are turned into ``COMPUTE``, without ``stored_scales``, nothing
    of learned logits without ``sink_logits``, and of caps without ``log2_cap``, which is in base 2.
    """
    request, tile = tl.program_id(0), 0
    if not ONE_TILE:
        request, tile = find_tile(query_start_loc, tl.program_id(0), num_requests, GROUP, ROWS)
    first_row = tile * ROWS
    run = tl.program_id(1)
    head = tl.program_id(2)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    begin, num_pages, boundary, num_tokens = find_pair(
        offsets, boundaries, slots, seq_lens, request, first_pair + head, PAIRS, N
    )
    if quantized_offsets is not None:
        quantized_begin, quantized_tokens = find_quantized(
            quantized_offsets, slots, request, first_pair + head, num_pages, boundary, PAIRS, N, Q
        )
        num_tokens += quantized_tokens
    rows = first_row + tl.arange(0, ROWS)
    token = rows // GROUP
    seen = tl.where(token < query_len, num_tokens - query_len + token + 1, 0)
    start, end = 0, tl.max(seen, 0)
    if not ONE_RUN:
        length = run_length(num_tokens, tl.num_programs(1), TOKENS, LEAST)
        start = run * length
        end = tl.minimum(end, start + length)
    if first_row >= query_len * GROUP or start >= end:
        return

    dims = tl.arange(0, D_PADDED)
    in_head = dims < D
    query_head = head * GROUP + rows % GROUP
    row_ok = token < query_len
    row_token = (query_start + token).to(tl.int64)
    row_start = row_token * query_token_stride + query_head * query_head_stride
    mask = row_ok[:, None] & in_head[None, :]
    q = tl.load(query + row_start[:, None] + dims[None, :], mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    elif stored_scales is not None:
        q = q.to(COMPUTE)
    key_log2_scale = log2_scale
    if stored_scales is not None:
        log2_scale *= tl.load(stored_scales + head)
        key_log2_scale = log2_scale * tl.load(stored_scales + HEADS + head)
        value_scale = tl.load(stored_scales + 2 * HEADS + head)
    table_row = block_table + request.to(tl.int64) * table_stride
    tail_page = layer_page + head * PER_HEAD

    best, total, acc = start_softmax(sink_logits, query_head, run == 0, ROWS, D_PADDED)
    if quantized_offsets is not None:
        if start < quantized_tokens:
            transform_row = tl.load(slots + request).to(tl.int64) * PAIRS + first_pair + head
            best, total, acc = attend_quantized(
                q, best, total, acc, start, tl.minimum(end, quantized_tokens),
                quantized_begin, key_transforms + transform_row * ((2 + FIRST) * D),
                quantized_pages, quantized_stride, code_book,
                rotation, table_row, first_page, layer_stride, block_stride, log2_scale, log2_cap,
                HEADS, PAIRS, PER_HEAD, D, D_PADDED, QUANTIZED_TOKENS, UPCAST, PRECISION,
                Q, SPLIT, FIRST,
                KEY_LOAD, KEY_CODES, KEY_GROUP, KEY_SCALES, KEY_BLOCK,
                VALUE_LOAD, VALUE_CODES, VALUE_GROUP, VALUE_SCALES, VALUE_BLOCK,
            )  # fmt: skip
            if stored_scales is not None:
                acc /= value_scale  # what follows is summed up as it is stored
        start = tl.maximum(start - quantized_tokens, 0)
        end -= quantized_tokens
        seen -= quantized_tokens
    for position in range(start, end, TOKENS):
        tokens = position + tl.arange(0, TOKENS)
        wanted = tokens < end
        page = find_pages(
            tokens // N, wanted, begin, num_pages, boundary, table_row, tail_page, first_page,
            layer_stride, block_stride, HEADS, PAIRS, PER_HEAD,
        )  # fmt: skip
        in_page = tokens % N
        kv_mask = wanted[:, None] & in_head[None, :]
        key_place = page * key_page_stride + in_page * key_token_stride
        key_place = key_place[:, None] + (dims * key_dim_stride)[None, :]
        k = tl.load(key_pages + key_place, mask=kv_mask, other=0.0)
        value_place = page * value_page_stride + in_page * value_token_stride
        value_place = value_place[:, None] + (dims * value_dim_stride)[None, :]
        v = tl.load(value_pages + value_place, mask=kv_mask, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        elif stored_scales is not None:
            k = k.to(COMPUTE)
            v = v.to(COMPUTE)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * key_log2_scale
        logits = cap_logits(logits, log2_cap)
        visible = tokens[None, :] < tl.minimum(seen, end)[:, None]
        logits = tl.where(visible, logits, float("-inf"))
        best, total, acc, weights = weigh_tile(best, total, acc, logits)
        acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)

    out_start = row_token * output_token_stride + query_head * output_head_stride
    sums = tl.where(total > 0, total, 1.0)
    result = acc / sums[:, None]
    if stored_scales is not None:
        result *= value_scale
    if not ONE_RUN:
        out_start += run.to(tl.int64) * run_stride
        sums_place = run.to(tl.int64) * sums_run_stride + row_token * sums_token_stride + query_head
        tl.store(log_sums + sums_place, best + tl.log2(sums), mask=row_ok)
    tl.store(output + out_start[:, None] + dims[None, :], result, mask=mask)


def head_page_attention(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    query_start_loc: torch.Tensor,
    tables: PageTables,
    layer: int,
    scale: float,
    *,
    max_query_len: int,
    max_tokens: int,
    quantized: QuantizedPages | None = None,
    stored_scales: torch.Tensor | None = None,
    sink_logits: torch.Tensor | None = None,
    soft_cap: float | None = None,
    output: torch.Tensor | None = None,
    num_runs: int | None = None,
    least_run: int = LEAST_RUN,
    rows: int | None = None,
    tokens: int | None = None,
    quantized_tokens: int | None = None,
    num_warps: int | None = None,
    num_stages: int = 3,
) -> torch.Tensor:
    """Causal attention of one layer over head pages; queries are each request's last tokens.

    Nothing is read back from the device.

    Args:
        query: float32, bfloat16 or float16 ``[tokens, H * G, D]``, last dimension contiguous; also
            float8_e4m3fn with ``stored_scales``.
        key_pages, value_pages: ``[P, N, D]`` in the same dtype, or float8_e4m3fn with
            ``stored_scales``; views of any strides, contiguous rows are read fastest.
        query_start_loc: int32 ``[R + 1]``.
        tables: where each request's KV pairs lie.
        layer: which layer's pages.
        scale: softmax scale.
        max_query_len: of any request.
        max_tokens: no pair of the batch attends over more; the longest logical length will do.
        quantized: how the quantized pages of ``tables`` are read; None if it has none.
        stored_scales: float32 ``[3, H]``, contiguous, what the stored numbers of queries, keys and
            values are multiplied with; None: nothing. Quantized pages hold numbers that are
            multiplied already.
        sink_logits: float32, bfloat16 or float16 ``[H * G]``, contiguous, a logit of each query
            head that joins its softmax and has no value; None: there is none.
        soft_cap: scaled logits become ``soft_cap * tanh(logits / soft_cap)``; None or 0: they stay.
        output: like ``query``, in the dtype of the model; made when None.
        num_runs, least_run, rows, tokens, quantized_tokens, num_warps, num_stages: how the work is
            cut; chosen when None. At most 64 runs.

    Returns:
        ``output``.

    Raises:
        ValueError: if only some of ``quantized``, ``tables.quantized_offsets`` and
            ``tables.key_transforms`` are given, the quantized pages do not suit the queries, 8-bit
            numbers have no scales, or there is not one learned logit for each query head.
    """
    of_tier = quantized, tables.quantized_offsets, tables.key_transforms
    if len({part is None for part in of_tier}) > 1:
        raise ValueError("quantized pages, their offsets and key transforms go together")
    if output is None:
        output = torch.empty_like(query)
    dtype = output.dtype
    if dtype.itemsize == 1 or (stored_scales is None and key_pages.dtype != dtype):
        raise ValueError("8-bit numbers need an output in the dtype of the model, and scales")
    num_tokens, num_query_heads, head_dim = query.shape
    if quantized is not None:
        quantized.check(head_dim, dtype)
    if sink_logits is not None and sink_logits.shape != (num_query_heads,):
        raise ValueError(f"{len(sink_logits)} learned logits for {num_query_heads} query heads")
    num_heads = tables.num_kv_heads
    num_requests = len(tables.slots)
    group = num_query_heads // num_heads
    tile = choose_tile(
        head_dim,
        dtype,
        group * max_query_len,
        two_tiers=quantized is not None,
        eight_bits=stored_scales is not None,
        large_blocks=tables.place.pages_per_head > 1,
    )
    rows, tokens = rows or tile.rows, tokens or tile.tokens
    if num_warps is None:
        num_warps = tile.num_warps if rows == tile.rows else 4 if rows <= 32 else 8
    one_tile = max_query_len * group <= rows
    tiles = num_requests if one_tile else num_tokens * group // rows + num_requests
    if num_runs is None:
        programs, processors = tiles * num_heads, num_processors(query.device)
        num_runs = choose_num_runs(programs, max_tokens, processors, least_run)
        if not one_tile and programs >= 4 * processors:
            num_runs = 1  # partial results of many query tokens are large
    place, first_pair = tables.place, layer * num_heads
    parts, log_sums = output[None], query.new_empty(1, 1, 1, dtype=torch.float32)
    if num_runs > 1:
        parts = query.new_empty((num_runs, *query.shape), dtype=torch.float32)
        log_sums = query.new_empty((num_runs, num_tokens, num_query_heads), dtype=torch.float32)
    sizes = {
        "PAIRS": tables.num_pairs,
        "GROUP": group,
        "D": head_dim,
        "D_PADDED": triton.next_power_of_2(head_dim),
        "N": tables.page_tokens,
        "TOKENS": tokens,
        "LEAST": least_run,
    }
    tier = tier_arguments(quantized, tables, quantized_tokens or tile.quantized_tokens)
    stored = {}
    if stored_scales is not None:
        stored = {"stored_scales": stored_scales, "COMPUTE": COMPUTE_DTYPES[dtype]}
    log2_cap = soft_cap * LOG2_E.value if soft_cap else None
    attend_runs[tiles, num_runs, num_heads](
        query, key_pages, value_pages, parts, log_sums,
        tables.offsets, tables.boundary_pages, tables.slots, tables.seq_lens,
        tables.block_table, query_start_loc,
        scale * LOG2_E.value, num_requests, first_pair,
        place.first_page + layer * place.layer_stride,
        place.first_page, place.layer_stride, place.block_stride,
        query.stride(0), query.stride(1), *key_pages.stride(), *value_pages.stride(),
        *parts.stride()[:3], *log_sums.stride()[:2], tables.block_table.stride(0),
        HEADS=num_heads, PER_HEAD=place.pages_per_head, ROWS=rows, ONE_TILE=one_tile,
        ONE_RUN=num_runs == 1, UPCAST=INTERPRETED, PRECISION=dot_precision(dtype),
        **sizes, **tier, **stored, sink_logits=sink_logits, log2_cap=log2_cap,
        num_warps=num_warps, num_stages=num_stages,
    )  # fmt: skip
    if num_runs > 1:
        join_runs[max_query_len, num_requests, num_query_heads](
            parts, log_sums, output,
            tables.offsets, tables.boundary_pages, tables.slots, tables.seq_lens,
            query_start_loc, first_pair, num_runs,
            *parts.stride()[:3], *log_sums.stride()[:2], *output.stride()[:2],
            RUNS=MOST_RUNS, **sizes, num_warps=2,
            quantized_offsets=tables.quantized_offsets, Q=tier.get("Q"),
        )  # fmt: skip
    return output
