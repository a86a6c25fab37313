"""A softmax that is computed tile by tile, and run by run, with weighted sums of values beside it.

Logits are in base 2: natural ones times :data:`LOG2_E`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .page_tables import find_pair, find_quantized

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def weigh_tile(best, total, acc, logits):
    """Takes a tile of logits in: the weights of its tokens, and what was summed up, shrunk to fit.

    ``logits`` float32 ``[ROWS, TOKENS]``, in base 2, minus infinity where a row does not see a
    token; ``best`` and ``total`` float32 ``[ROWS]``, largest logit and sum of weights so far; and
    ``acc`` float32 ``[ROWS, D_PADDED]``, sum of weighted values. Returns the new ``best``,
    ``total`` and ``acc``, which still lacks this tile's values, and the weights, like ``logits``.
    """
    higher = tl.maximum(best, tl.max(logits, 1))
    anchor = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    weights = tl.exp2(logits - anchor[:, None])
    shrink = tl.exp2(best - anchor)
    total = total * shrink + tl.sum(weights, 1)
    return higher, total, acc * shrink[:, None], weights


@triton.jit
def start_softmax(sink_logits, query_head, is_first, ROWS: tl.constexpr, D_PADDED: tl.constexpr):
    """``best``, ``total`` and ``acc`` before the first tile; see :func:`weigh_tile`.

    ``sink_logits`` ``[H * G]``, natural logits that a model has learned, one of each query head,
    or None: it joins the softmax and has no value. Of a softmax in parts only the one that
    ``is_first`` has it. ``query_head`` int32 ``[ROWS]``.
    """
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sink_logits is not None:
        sink = tl.load(sink_logits + query_head).to(tl.float32) * LOG2_E
        best = tl.where(is_first, sink, best)
        total = tl.where(is_first, 1.0, total)
    return best, total, tl.zeros([ROWS, D_PADDED], tl.float32)


@triton.jit
def cap_logits(logits, cap):
    """``cap * tanh(logits / cap)``, of any logits; as they are if ``cap`` is None.

    Logits and cap are of the same base, whatever that is.
    """
    if cap is not None:
        power = tl.exp2(tl.minimum(logits * (2 * LOG2_E / cap), 64.0))
        logits = cap - 2 * cap / (power + 1)
    return logits


@triton.jit
def run_length(num_tokens, num_runs, TOKENS: tl.constexpr, LEAST: tl.constexpr):
    """Tokens of each run of a pair that is cut in at most ``num_runs``."""
    even = tl.cdiv(tl.cdiv(num_tokens, num_runs), TOKENS) * TOKENS
    return tl.maximum(even, LEAST)


@triton.jit(do_not_specialize=["first_pair", "num_runs", "run_stride", "sums_run_stride"])
def join_runs(
    parts, log_sums, output,
    offsets, boundaries, slots, seq_lens, query_start_loc, first_pair, num_runs,
    run_stride, parts_token_stride, parts_head_stride, sums_run_stride, sums_token_stride,
    output_token_stride, output_head_stride,
    PAIRS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    N: tl.constexpr, TOKENS: tl.constexpr, LEAST: tl.constexpr, RUNS: tl.constexpr,
    quantized_offsets=None, Q: tl.constexpr = None,
):  # fmt: skip
    """Weighted mean of the runs of one (token, query head); grid ``(most query tokens, R, H * G)``.

    Of a pair that has fewer runs than ``RUNS`` only those that were written are read.
    """
    request = tl.program_id(1)
    query_head = tl.program_id(2)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    index = tl.program_id(0)
    if index >= query_len:
        return
    pair = first_pair + query_head // GROUP
    _, num_pages, boundary, num_tokens = find_pair(
        offsets, boundaries, slots, seq_lens, request, pair, PAIRS, N
    )
    if quantized_offsets is not None:
        _, quantized_tokens = find_quantized(
            quantized_offsets, slots, request, pair, num_pages, boundary, PAIRS, N, Q
        )
        num_tokens += quantized_tokens
    seen = num_tokens - query_len + index + 1
    length = run_length(num_tokens, num_runs, TOKENS, LEAST)
    token = (query_start + index).to(tl.int64)
    runs = tl.arange(0, RUNS)
    there = runs * length < seen
    sums_place = runs.to(tl.int64) * sums_run_stride + token * sums_token_stride + query_head
    sums = tl.load(log_sums + sums_place, mask=there, other=float("-inf"))
    shares = tl.exp2(sums - tl.max(sums, 0))
    shares = shares / tl.sum(shares, 0)
    dims = tl.arange(0, D_PADDED)
    acc = tl.zeros([D_PADDED], tl.float32)
    start = parts + token * parts_token_stride + query_head * parts_head_stride
    for run in range(tl.cdiv(seen, length)):
        part = tl.load(start + dims, mask=dims < D, other=0.0)
        acc += part * tl.sum(tl.where(runs == run, shares, 0.0), 0)
        start += run_stride
    place = token * output_token_stride + query_head * output_head_stride
    tl.store(output + place + dims, acc, mask=dims < D)
