"""KVzip's score in one pass: the highest attention that any query pays to each key.

Section 3.2 of KVzip (arXiv 2505.23416): the score of a KV pair is the maximum over the queries of
its group of the softmax of their logits. With the normaliser of each softmax at hand, as a fused
attention returns it, no attention matrix is ever written: the maximum of logarithms is kept in
registers, and exponentiated once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launching import INTERPRETED, dot_precision
from .online_softmax import cap_logits


@triton.jit(
    do_not_specialize=[
        "num_queries",
        "num_keys",
        "query_head_stride",
        "key_head_stride",
        "normaliser_head_stride",
        "score_stride",
    ]
)
def highest_weight(
    queries, keys, log_normaliser, scores, scale, num_queries, num_keys,
    query_head_stride, query_stride, key_head_stride, key_stride,
    normaliser_head_stride, normaliser_stride, score_stride,
    D: tl.constexpr, D_PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, soft_cap=None,
):  # fmt: skip
    """Scores of one tile of keys of one KV head; grid ``(tiles of keys, H)``.

    Without ``soft_cap`` nothing of it is compiled.
    """
    head = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    dims = tl.arange(0, D_PADDED)
    in_head = (dims < D)[None, :]
    place = head * key_head_stride + columns.to(tl.int64) * key_stride
    k = tl.load(
        keys + place[:, None] + dims[None, :],
        mask=(columns < num_keys)[:, None] & in_head, other=0.0,
    )  # fmt: skip
    if UPCAST:
        k = k.to(tl.float32)
    best = tl.full([KEYS], float("-inf"), tl.float32)
    for first in range(0, num_queries, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        row_ok = rows < num_queries
        start = head * query_head_stride + rows.to(tl.int64) * query_stride
        q = tl.load(
            queries + start[:, None] + dims[None, :], mask=row_ok[:, None] & in_head, other=0.0
        )
        if UPCAST:
            q = q.to(tl.float32)
        sums_place = head * normaliser_head_stride + rows * normaliser_stride
        sums = tl.load(log_normaliser + sums_place, mask=row_ok, other=float("inf"))
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        best = tl.maximum(best, tl.max(cap_logits(logits, soft_cap) - sums[:, None], 0))
    weight = tl.minimum(tl.exp(best), 1.0)
    tl.store(scores + head * score_stride + columns, weight, mask=columns < num_keys)


def column_maximum(
    queries: torch.Tensor,
    keys: torch.Tensor,
    log_normaliser: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> torch.Tensor:
    """Highest softmax weight of each key over all queries of its group.

    Args:
        queries: float32, bfloat16 or float16 ``[H, M, D]``, all queries of a KV head's group; last
            dimension contiguous.
        keys: ``[H, C, D]``, like ``queries``.
        log_normaliser: float32 ``[H, M]`` of any strides, log of the sum of exponentials of each
            query's logits.
        scale: softmax scale.
        soft_cap: scaled logits become ``soft_cap * tanh(logits / soft_cap)``; None or 0: they stay.

    Returns:
        float32 ``[H, C]``, in [0, 1].
    """
    num_heads, num_queries, head_dim = queries.shape
    num_keys = keys.shape[1]
    scores = queries.new_empty((num_heads, num_keys), dtype=torch.float32)
    tile_keys, tile_queries = 64, 64 if head_dim <= 128 else 32
    highest_weight[triton.cdiv(num_keys, tile_keys), num_heads](
        queries, keys, log_normaliser, scores, scale, num_queries, num_keys,
        queries.stride(0), queries.stride(1), keys.stride(0), keys.stride(1),
        *log_normaliser.stride(), scores.stride(0),
        D=head_dim, D_PADDED=triton.next_power_of_2(head_dim), QUERIES=tile_queries,
        KEYS=tile_keys, UPCAST=INTERPRETED, PRECISION=dot_precision(queries.dtype), num_warps=4,
        soft_cap=soft_cap or None,
    )  # fmt: skip
    return scores
