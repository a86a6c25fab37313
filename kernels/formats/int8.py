"""8-bit integers with one scale per vector; see ``vllm_kvzip/quantization/formats/int8.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from ..quantized_pages import SMALLEST_SCALE, find_rows, load_rows, nearest_bfloat16
from ..quantized_tiles import PageCode, load_bfloat16


@triton.jit
def load_int8(
    pages, page, page_stride, in_page, wanted, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`."""
    dims = tl.arange(0, D_PADDED)
    place = page * page_stride + CODES + in_page * D
    codes = tl.load(
        pages + place[:, None] + dims[None, :],
        mask=wanted[:, None] & (dims < D)[None, :], other=0,
    )  # fmt: skip
    scale = load_bfloat16(pages, page * page_stride + SCALES + in_page * 2, wanted)
    return codes.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]


@triton.jit
def store_int8(
    vectors, rows, vector_stride, pages, page, page_stride, index, code_book,
    CODES: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, BLOCK: tl.constexpr,
    N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """See :class:`PageCode`."""
    dims = tl.arange(0, D_PADDED)
    for first in range(0, N, TOKENS):
        tokens, in_page, row = find_rows(rows, index, first, N, TOKENS)
        in_head = (dims < D)[None, :]
        x = load_rows(vectors, row[:, None], vector_stride, dims[None, :],
                      (row >= 0)[:, None] & in_head)  # fmt: skip
        exact = tl.maximum(tl.max(tl.abs(x), 1) * (1 / 127), SMALLEST_SCALE)
        scale = nearest_bfloat16(exact)
        codes = tl.floor(tl.div_rn(x, scale[:, None]) + 0.5)
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8)
        place = page * page_stride + CODES + tokens * D
        tl.store(
            pages + place[:, None] + dims[None, :], codes.to(tl.uint8, bitcast=True),
            mask=in_page[:, None] & in_head,
        )  # fmt: skip
        scales = pages.to(tl.pointer_type(tl.bfloat16)) + page * (page_stride // 2) + SCALES // 2
        tl.store(scales + tokens, scale.to(tl.bfloat16), mask=in_page)


PAGE_CODE = PageCode(load_int8, store_int8)
