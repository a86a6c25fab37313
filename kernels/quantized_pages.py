"""Quantized head pages: filled from rows of keys and values, and read back into dense rows.

How a vector becomes bytes is its format's Triton code, a ``PageCode``; here are the kernels around
it, and what such code shares when it fills pages.

The plain-torch references are ``pack_pages`` and ``unpack_pages`` (``vllm_kvzip/quantization/
pages.py``): every byte written and every value read is the same. Both divide with correct rounding
and round scales by their bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from .quantized_tiles import FLOAT8_EXPONENT, load_functions, page_constants, store_functions

if TYPE_CHECKING:
    import torch

    from .quantized_tiles import PageLayout

LARGEST = tl.constexpr(2.0**126)
SMALLEST_SCALE = tl.constexpr(2.0**-100)
SPAN_OF_16 = tl.constexpr((1 - 2**-16) / 15)
LARGEST_FLOAT8 = tl.constexpr(1.9375)
"""As in ``quantization/packing.py``."""


@triton.jit
def nearest_bfloat16(values):
    """float32 rounded to bfloat16, ties to even; by its bits, as the interpreter's cast cuts."""
    bits = values.to(tl.int32, bitcast=True)
    return round_to_bfloat16(bits + 0x7FFF + ((bits >> 16) & 1))


@triton.jit
def bfloat16_above(values):
    """The next bfloat16, as float32, that is not smaller than a value that is not negative."""
    return round_to_bfloat16(values.to(tl.int32, bitcast=True) + 0xFFFF)


@triton.jit
def bfloat16_below(values):
    """The next bfloat16, as float32, that is not larger."""
    bits = values.to(tl.int32, bitcast=True)
    return round_to_bfloat16(bits + ((bits >> 31) & 0xFFFF))


@triton.jit
def power_of_two_above(values):
    """The next power of two, as float32, that is not smaller than a positive normal value."""
    bits = values.to(tl.int32, bitcast=True) + 0x7FFFFF
    return ((bits >> 23) << 23).to(tl.float32, bitcast=True)


@triton.jit
def round_to_bfloat16(bits):
    """Bits of a float32 without its low half."""
    return ((bits >> 16) << 16).to(tl.float32, bitcast=True)


@triton.jit
def encode_float8(values):
    """The nearest unsigned 8-bit floats, uint8; see ``float8_encode``."""
    rounded = (values.to(tl.int32, bitcast=True) + (1 << 18)) >> 19
    return tl.minimum(tl.maximum(rounded - FLOAT8_EXPONENT, 0), 255).to(tl.uint8)


@triton.jit
def load_rows(vectors, rows, vector_stride, place, mask):
    """Values of rows as float32 of limited magnitude; ``place`` is the place in each row."""
    x = tl.load(vectors + rows * vector_stride + place, mask=mask, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(x, -LARGEST), LARGEST)


@triton.jit
def find_rows(rows, index, first, N: tl.constexpr, TOKENS: tl.constexpr):
    """Tokens of a page from number ``first`` on: which are in the page, and their rows or -1."""
    tokens = first + tl.arange(0, TOKENS)
    in_page = tokens < N
    row = tl.load(rows + index.to(tl.int64) * N + tokens, mask=in_page, other=-1).to(tl.int64)
    return tokens, in_page, row


@triton.jit
def load_blocks(
    vectors, rows, vector_stride, index, first, N: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Tokens, whether blocks are in the page, and both halves of the blocks, 3-dimensional."""
    blocks = tl.arange(0, D_PADDED // BLOCK)
    inner = tl.arange(0, BLOCK // 2)
    tokens, in_page, row = find_rows(rows, index, first, N, TOKENS)
    in_head = blocks < D // BLOCK
    mask = ((row >= 0)[:, None] & in_head[None, :])[:, :, None]
    place = (blocks[:, None] * BLOCK + inner[None, :])[None, :, :]
    low = load_rows(vectors, row[:, None, None], vector_stride, place, mask)
    high = load_rows(vectors, row[:, None, None], vector_stride, place + BLOCK // 2, mask)
    return tokens, in_page[:, None] & in_head[None, :], low, high


@triton.jit
def store_nibbles(
    pages, page, page_stride, tokens, there, low, high,
    CODES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """4-bit codes, int32, of the first and of the second half of every block, two a byte."""
    BLOCKS: tl.constexpr = D // BLOCK
    blocks = tl.arange(0, D_PADDED // BLOCK)
    inner = tl.arange(0, BLOCK // 2)
    place = (tokens[:, None] * BLOCKS + blocks[None, :]) * (BLOCK // 2)
    place = page * page_stride + CODES + place[:, :, None] + inner[None, None, :]
    tl.store(pages + place, (low | (high << 4)).to(tl.uint8), mask=there[:, :, None])


@triton.jit
def fill_quantized(
    keys, values, rows, pages, page_ids, code_book,
    key_stride, value_stride, page_stride,
    KEY_STORE: tl.constexpr, KEY_CODES: tl.constexpr,
    KEY_GROUP: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_STORE: tl.constexpr, VALUE_CODES: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The keys of a page, or its values; grid ``(pages, 2)``."""
    index = tl.program_id(0)
    page = tl.load(page_ids + index).to(tl.int64)
    if tl.program_id(1) == 0:
        KEY_STORE(
            keys, rows, key_stride, pages, page, page_stride, index, code_book,
            KEY_CODES, KEY_GROUP, KEY_SCALES, KEY_BLOCK,
            N, D, D_PADDED, TOKENS,
        )  # fmt: skip
    else:
        VALUE_STORE(
            values, rows, value_stride, pages, page, page_stride, index, code_book,
            VALUE_CODES, VALUE_GROUP, VALUE_SCALES, VALUE_BLOCK,
            N, D, D_PADDED, TOKENS,
        )  # fmt: skip


@triton.jit
def read_quantized(
    pages, page_ids, keys, values, code_book, num_tokens, page_stride, key_stride, value_stride,
    KEY_LOAD: tl.constexpr, KEY_CODES: tl.constexpr,
    KEY_GROUP: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_LOAD: tl.constexpr, VALUE_CODES: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Some tokens, of one page or more, as dense rows; grid ``(tiles of tokens,)``."""
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    wanted = tokens < num_tokens
    page = tl.load(page_ids + tokens // N, mask=wanted, other=0).to(tl.int64)
    in_page = tokens % N
    dims = tl.arange(0, D_PADDED)
    row = tokens.to(tl.int64)[:, None]
    mask = wanted[:, None] & (dims < D)[None, :]
    k = KEY_LOAD(
        pages, page, page_stride, in_page, wanted, code_book,
        KEY_CODES, KEY_GROUP, KEY_SCALES, KEY_BLOCK, D, D_PADDED,
    )  # fmt: skip
    tl.store(keys + row * key_stride + dims[None, :], k, mask=mask)
    v = VALUE_LOAD(
        pages, page, page_stride, in_page, wanted, code_book,
        VALUE_CODES, VALUE_GROUP, VALUE_SCALES, VALUE_BLOCK,
        D, D_PADDED,
    )  # fmt: skip
    tl.store(values + row * value_stride + dims[None, :], v, mask=mask)


def quantize_pages(
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: torch.Tensor,
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    layout: PageLayout,
    code_book: torch.Tensor | None,
) -> None:
    """Fill whole pages from rows of keys and values, wherever those lie.

    Args:
        keys, values: float32, bfloat16 or float16 ``[R, D]``, last dimension contiguous, finite in
            the rows that are read.
        rows: int32 or int64 ``[n, page tokens]``, contiguous: the row of each token, or -1 for
            none, which is stored as zeros.
        pages: uint8 ``[P, page_bytes]``, rows contiguous, 16 bytes aligned; pages ``page_ids`` are
            written, but for the bytes that belong to no region.
        page_ids: int32 or int64 ``[n]``, all different.
        layout: of the pages.
        code_book: float16, of the formats that have one; where the pages are.

    Raises:
        ValueError: if ``pages`` are not of the layout, strides are not as said, or a
            format has no Triton code.
    """
    _check(pages, layout, keys, values)
    if rows.shape != (len(page_ids), layout.page_tokens) or not rows.is_contiguous():
        raise ValueError(f"rows must be contiguous [{len(page_ids)}, {layout.page_tokens}]")
    fill_quantized[(len(page_ids), 2)](
        keys, values, rows, pages, page_ids, pages if code_book is None else code_book,
        keys.stride(0), values.stride(0), pages.stride(0),
        **page_constants(layout), **store_functions(layout), TOKENS=_tile_tokens(layout),
        num_warps=4,
    )  # fmt: skip


def dequantize_pages(
    pages: torch.Tensor,
    page_ids: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: PageLayout,
    code_book: torch.Tensor | None,
) -> None:
    """Read whole pages into dense rows.

    Args:
        pages: uint8 ``[P, page_bytes]``, rows contiguous, 16 bytes aligned.
        page_ids: int32 or int64 ``[n]``.
        keys, values: float32, bfloat16 or float16 ``[n * page tokens, D]``, last dimension
            contiguous; written.
        layout: of the pages.
        code_book: float16, of the formats that have one; where the pages are.

    Raises:
        ValueError: if ``pages`` are not of the layout, strides are not as said, or a
            format has no Triton code.
    """
    _check(pages, layout, keys, values)
    num_tokens, tokens = len(page_ids) * layout.page_tokens, _tile_tokens(layout)
    read_quantized[(triton.cdiv(num_tokens, tokens),)](
        pages, page_ids, keys, values, pages if code_book is None else code_book, num_tokens,
        pages.stride(0), keys.stride(0), values.stride(0),
        **page_constants(layout), **load_functions(layout), TOKENS=tokens, num_warps=4,
    )  # fmt: skip


def _tile_tokens(layout: PageLayout) -> int:
    """Tokens a program holds at once: 32 values a thread."""
    tokens: int = 4096 // triton.next_power_of_2(layout.head_dim)
    return min(64, max(16, tokens))


def _check(
    pages: torch.Tensor, layout: PageLayout, keys: torch.Tensor, values: torch.Tensor
) -> None:
    if pages.shape[1] != layout.page_bytes or pages.stride(1) != 1 or pages.stride(0) % 16:
        raise ValueError(f"pages must be contiguous rows of {layout.page_bytes} bytes, 16 aligned")
    for vectors in (keys, values):
        if vectors.shape[1] != layout.head_dim or vectors.stride(1) != 1:
            raise ValueError(f"keys and values must be contiguous rows of {layout.head_dim}")
