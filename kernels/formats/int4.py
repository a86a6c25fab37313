"""4-bit integers with scales and zero points; see ``vllm_kvzip/quantization/formats/int4.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..quantized_pages import (
    SMALLEST_SCALE,
    SPAN_OF_16,
    bfloat16_above,
    bfloat16_below,
    load_blocks,
    store_nibbles,
)
from ..quantized_tiles import PageCode, join_halves, load_bfloat16, load_nibbles, wanted_blocks


@triton.jit
def load_int4(
    pages, page, page_stride, in_page, wanted, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`."""
    there = wanted_blocks(wanted, BLOCK, D, D_PADDED)
    low, high = load_nibbles(pages, page, page_stride, in_page, there, CODES, BLOCK, D, D_PADDED)
    BLOCKS: tl.constexpr = D // BLOCK
    blocks = tl.arange(0, D_PADDED // BLOCK)
    place = (page * page_stride + SCALES + in_page * (4 * BLOCKS))[:, None] + blocks[None, :] * 2
    scale = load_bfloat16(pages, place, there)
    zero = load_bfloat16(pages, place + BLOCKS * 2, there)
    first = zero[:, :, None] + low.to(tl.float32) * scale[:, :, None]
    second = zero[:, :, None] + high.to(tl.float32) * scale[:, :, None]
    return join_halves(first, second, in_page.shape[0], D_PADDED)


@triton.jit
def store_int4(
    vectors, rows, vector_stride, pages, page, page_stride, index, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`."""
    BLOCKS: tl.constexpr = D // BLOCK
    blocks = tl.arange(0, D_PADDED // BLOCK)
    for first in range(0, N, TOKENS):
        tokens, there, low, high = load_blocks(
            vectors, rows, vector_stride, index, first, N, D, D_PADDED, BLOCK, TOKENS
        )
        least = tl.min(tl.minimum(low, high), 2)
        zero = bfloat16_below(tl.where(least == 0.0, 0.0, least))  # zero without a sign
        spread = (tl.max(tl.maximum(low, high), 2) - zero) * SPAN_OF_16
        scale = bfloat16_above(tl.maximum(spread, SMALLEST_SCALE))
        scales = pages.to(tl.pointer_type(tl.bfloat16))
        place = page * (page_stride // 2) + SCALES // 2 + blocks[None, :]
        place += tokens[:, None] * (2 * BLOCKS)
        tl.store(scales + place, scale.to(tl.bfloat16), mask=there)
        tl.store(scales + place + BLOCKS, zero.to(tl.bfloat16), mask=there)
        low = tl.div_rn(low - zero[:, :, None], scale[:, :, None])
        high = tl.div_rn(high - zero[:, :, None], scale[:, :, None])
        low = tl.minimum(tl.maximum(tl.floor(low + 0.5), 0.0), 15.0).to(tl.int32)
        high = tl.minimum(tl.maximum(tl.floor(high + 0.5), 0.0), 15.0).to(tl.int32)
        store_nibbles(pages, page, page_stride, tokens, there, low, high, CODES, BLOCK, D, D_PADDED)


PAGE_CODE = PageCode(load_int4, store_int4)
