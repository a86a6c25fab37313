"""The step of the running softmax, tile by tile, against one softmax (``online_softmax.py``)."""

import math

import pytest
import torch
import triton
import triton.language as tl

from vllm_kvzip.kernels.online_softmax import weigh_tile

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")


@triton.jit
def weigh_all(
    logits, values, sums, totals, num_tokens,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    rows, dims = tl.arange(0, ROWS), tl.arange(0, D)
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for first in range(0, num_tokens, TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        tile = tl.load(logits + rows[:, None] * num_tokens + tokens[None, :])
        best, total, acc, weights = weigh_tile(best, total, acc, tile)
        acc += tl.dot(weights, tl.load(values + tokens[:, None] * D + dims[None, :]))
    tl.store(sums + rows[:, None] * D + dims[None, :], acc / total[:, None])
    tl.store(totals + rows, best + tl.log2(total))


def test_tiles_add_up_to_one_softmax():
    """Rows that see nothing at first, whose best token comes last, or that see one token alone."""
    torch.manual_seed(0)
    logits, values = torch.randn(16, 96) * 4, torch.randn(96, 16)
    logits[1, :64] = float("-inf")
    logits[2, 95] = 80.0
    logits[3, 1:] = float("-inf")
    sums, totals = torch.empty(16, 16), torch.empty(16)
    weigh_all[(1,)](logits, values, sums, totals, 96, ROWS=16, TOKENS=32, D=16)
    natural = logits * math.log(2)
    torch.testing.assert_close(sums, natural.softmax(-1) @ values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(totals * math.log(2), natural.logsumexp(-1), rtol=1e-4, atol=1e-4)
