"""One step of a softmax that is computed tile by tile, with weighted sums of values beside it."""

from __future__ import annotations

import triton
import triton.language as tl


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
