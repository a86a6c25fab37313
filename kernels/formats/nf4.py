"""4-bit NormalFloat; see ``vllm_kvzip/quantization/formats/nf4.py``.

Codes are looked up in 16 half floats, which lie in one line of the L1 cache. Triton's pipeliner
leaves loads of two bytes alone; float32 levels it would stage in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..quantized_pages import (
    LARGEST_FLOAT8,
    SMALLEST_SCALE,
    encode_float8,
    load_blocks,
    nearest_bfloat16,
    power_of_two_above,
    store_nibbles,
)
from ..quantized_tiles import (
    PageCode,
    decode_float8,
    join_halves,
    load_bfloat16,
    load_nibbles,
    load_word,
    wanted_blocks,
)


@triton.jit
def load_nf4(
    pages, page, page_stride, in_page, wanted, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`; with bfloat16 scales."""
    there = wanted_blocks(wanted, BLOCK, D, D_PADDED)
    low, high = load_nibbles(pages, page, page_stride, in_page, there, CODES, BLOCK, D, D_PADDED)
    BLOCKS: tl.constexpr = D // BLOCK
    blocks = tl.arange(0, D_PADDED // BLOCK)
    place = (page * page_stride + SCALES + in_page * (2 * BLOCKS))[:, None] + blocks[None, :] * 2
    scale = load_bfloat16(pages, place, there)
    return look_up(code_book, low, high, scale, in_page.shape[0], D_PADDED)


@triton.jit
def load_double_nf4(
    pages, page, page_stride, in_page, wanted, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`; with 8-bit scales under a group scale."""
    there = wanted_blocks(wanted, BLOCK, D, D_PADDED)
    low, high = load_nibbles(pages, page, page_stride, in_page, there, CODES, BLOCK, D, D_PADDED)
    BLOCKS: tl.constexpr = D // BLOCK
    blocks = tl.arange(0, D_PADDED // BLOCK)
    group = tl.load(
        pages.to(tl.pointer_type(tl.float32)) + page * (page_stride // 4) + GROUP // 4,
        mask=wanted, other=0.0,
    )  # fmt: skip
    place = (page * page_stride + SCALES + in_page * BLOCKS)[:, None] + blocks[None, :]
    stored = load_word(pages, place, there) & 255
    scale = tl.where(there, decode_float8(stored) * group[:, None], 0.0)  # code 0 is not zero
    return look_up(code_book, low, high, scale, in_page.shape[0], D_PADDED)


@triton.jit
def look_up(code_book, low, high, scale, TOKENS: tl.constexpr, D_PADDED: tl.constexpr):
    """Levels of codes times their scales, ``[TOKENS, D_PADDED]``."""
    first = tl.load(code_book + low).to(tl.float32) * scale[:, :, None]
    second = tl.load(code_book + high).to(tl.float32) * scale[:, :, None]
    return join_halves(first, second, TOKENS, D_PADDED)


@triton.jit
def nearest_level(x, code_book):
    """NormalFloat codes of values in [-1, 1]: how many means of neighbouring levels are less."""
    codes = tl.zeros(x.shape, tl.int32)
    for number in tl.static_range(15):
        level = tl.load(code_book + number).to(tl.float32)
        following = tl.load(code_book + number + 1).to(tl.float32)
        codes += (x > (level + following) * 0.5).to(tl.int32)
    return codes


@triton.jit
def exact_scales(low, high):
    """The largest magnitude of every block."""
    exact = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 2)
    return tl.maximum(exact, SMALLEST_SCALE)


@triton.jit
def store_nf4(
    vectors, rows, vector_stride, pages, page, page_stride, index, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`; with bfloat16 scales."""
    BLOCKS: tl.constexpr = D // BLOCK
    blocks = tl.arange(0, D_PADDED // BLOCK)
    for first in range(0, N, TOKENS):
        tokens, there, low, high = load_blocks(
            vectors, rows, vector_stride, index, first, N, D, D_PADDED, BLOCK, TOKENS
        )
        scale = nearest_bfloat16(exact_scales(low, high))
        scales = pages.to(tl.pointer_type(tl.bfloat16))
        place = page * (page_stride // 2) + SCALES // 2 + blocks[None, :]
        place += tokens[:, None] * BLOCKS
        tl.store(scales + place, scale.to(tl.bfloat16), mask=there)
        low = nearest_level(tl.div_rn(low, scale[:, :, None]), code_book)
        high = nearest_level(tl.div_rn(high, scale[:, :, None]), code_book)
        store_nibbles(pages, page, page_stride, tokens, there, low, high, CODES, BLOCK, D, D_PADDED)


@triton.jit
def store_double_nf4(
    vectors, rows, vector_stride, pages, page, page_stride, index, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`; the group scale takes a pass over the page of its own."""
    BLOCKS: tl.constexpr = D // BLOCK
    blocks = tl.arange(0, D_PADDED // BLOCK)
    largest = tl.zeros([TOKENS], tl.float32)
    for first in range(0, N, TOKENS):
        _, _, low, high = load_blocks(
            vectors, rows, vector_stride, index, first, N, D, D_PADDED, BLOCK, TOKENS
        )
        both = tl.maximum(tl.abs(low), tl.abs(high))
        largest = tl.maximum(largest, tl.max(tl.max(both, 2), 1))
    group = tl.maximum(tl.max(largest, 0), SMALLEST_SCALE) * (1 / LARGEST_FLOAT8)
    group = power_of_two_above(group)
    groups = pages.to(tl.pointer_type(tl.float32)) + page * (page_stride // 4)
    tl.store(groups + GROUP // 4, group)
    for first in range(0, N, TOKENS):
        tokens, there, low, high = load_blocks(
            vectors, rows, vector_stride, index, first, N, D, D_PADDED, BLOCK, TOKENS
        )
        stored = encode_float8(tl.div_rn(exact_scales(low, high), group))
        scale = decode_float8(stored) * group
        place = page * page_stride + SCALES + tokens[:, None] * BLOCKS + blocks[None, :]
        tl.store(pages + place, stored, mask=there)
        low = nearest_level(tl.div_rn(low, scale[:, :, None]), code_book)
        high = nearest_level(tl.div_rn(high, scale[:, :, None]), code_book)
        store_nibbles(pages, page, page_stride, tokens, there, low, high, CODES, BLOCK, D, D_PADDED)


PAGE_CODE = PageCode(load_nf4, store_nf4)
DOUBLE_PAGE_CODE = PageCode(load_double_nf4, store_double_nf4)
