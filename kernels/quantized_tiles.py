"""A tile of keys or of values out of quantized head pages, for kernels that attend over them.

``vllm_kvzip.quantization`` has the formats and the layout of a page; the plain-torch reference is
``unpack_pages`` (``quantization/pages.py``), of which every bit is the same: products are made in
one order, and those with which a compiler could fuse an addition are exact.

The 4-bit codes of a block lie two a byte, the second half of the block in the high bits. A tile of
bytes is unpacked by a mask and a shift into two tiles that share their scales; nothing moves
between threads. NormalFloat codes are looked up in 16 half floats, which lie in one line of the L1
cache. Triton's pipeliner leaves loads of two bytes alone; float32 levels it would stage in shared
memory. Scales, which are to be there in time, are taken out of words of four bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import triton
import triton.language as tl

if TYPE_CHECKING:

    class Format(Protocol):
        """What kernels want to know of a format; see ``quantization/base.py``."""

        @property
        def kernel_name(self) -> str: ...
        @property
        def group_bytes(self) -> int: ...
        def block_values(self, head_dim: int) -> int: ...

    class HalfPage(Protocol):
        """Where the keys or the values of a page lie; see ``quantization/layout.py``."""

        @property
        def format(self) -> Format: ...
        @property
        def codes_offset(self) -> int: ...
        @property
        def group_offset(self) -> int: ...
        @property
        def scales_offset(self) -> int: ...

    class PageLayout(Protocol):
        """How a page is filled; see ``quantization/layout.py``."""

        @property
        def page_bytes(self) -> int: ...
        @property
        def page_tokens(self) -> int: ...
        @property
        def head_dim(self) -> int: ...
        @property
        def keys(self) -> HalfPage: ...
        @property
        def values(self) -> HalfPage: ...


FLOAT8_EXPONENT = tl.constexpr((127 - 15) << 4)
"""As in ``quantization/scales.py``."""


@triton.jit
def load_quantized(
    pages, page, page_stride, in_page, wanted, code_book,
    FORMAT: tl.constexpr, DOUBLE: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """Keys, or values, of some tokens: float32 ``[TOKENS, D_PADDED]``, zero where there are none.

    ``page`` (int64) and ``in_page`` say where each token lies, ``[TOKENS]``. What is not ``wanted``
    and what lies behind D is neither read nor other than zero.
    """
    if FORMAT == "int8":
        dims = tl.arange(0, D_PADDED)
        place = page * page_stride + CODES + in_page * D
        codes = tl.load(
            pages + place[:, None] + dims[None, :],
            mask=wanted[:, None] & (dims < D)[None, :], other=0,
        )  # fmt: skip
        scale = load_bfloat16(pages, page * page_stride + SCALES + in_page * 2, wanted)
        tile = codes.to(tl.int8, bitcast=True).to(tl.float32) * scale[:, None]
    else:
        low, high = load_quantized_halves(
            pages, page, page_stride, in_page, wanted, code_book,
            FORMAT, DOUBLE, CODES, GROUP, SCALES, BLOCK, D, D_PADDED,
        )  # fmt: skip
        both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
        tile = tl.reshape(both, (in_page.shape[0], D_PADDED))
    return tile


@triton.jit
def load_quantized_halves(
    pages, page, page_stride, in_page, wanted, code_book,
    FORMAT: tl.constexpr, DOUBLE: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """As :func:`load_quantized`, for 4-bit formats: the first and the second half of every block.

    Both are float32 ``[TOKENS, D_PADDED / BLOCK, BLOCK / 2]``.
    """
    blocks = tl.arange(0, D_PADDED // BLOCK)
    inner = tl.arange(0, BLOCK // 2)
    there = wanted[:, None] & (blocks < D // BLOCK)[None, :]
    place = (page * page_stride + CODES + in_page * (D // 2))[:, None]
    place = place + blocks[None, :] * (BLOCK // 2)
    packed = tl.load(
        pages + place[:, :, None] + inner[None, None, :], mask=there[:, :, None], other=0
    )
    low = (packed & 15).to(tl.int32)
    high = (packed >> 4).to(tl.int32)

    if DOUBLE:
        group = tl.load(
            pages.to(tl.pointer_type(tl.float32)) + page * (page_stride // 4) + GROUP // 4,
            mask=wanted, other=0.0,
        )  # fmt: skip
        place = (page * page_stride + SCALES + in_page * (D // BLOCK))[:, None] + blocks[None, :]
        stored = load_word(pages, place, there) & 255
        scale = tl.where(there, decode_float8(stored) * group[:, None], 0.0)  # code 0 is not zero
    else:
        NUMBERS: tl.constexpr = D // BLOCK * (2 if FORMAT == "int4" else 1)
        place = (page * page_stride + SCALES + in_page * (2 * NUMBERS))[:, None]
        place = place + blocks[None, :] * 2
        scale = load_bfloat16(pages, place, there)
    if FORMAT == "int4":
        zero = load_bfloat16(pages, place + D // BLOCK * 2, there)
        first = zero[:, :, None] + low.to(tl.float32) * scale[:, :, None]
        second = zero[:, :, None] + high.to(tl.float32) * scale[:, :, None]
    else:
        first = tl.load(code_book + low).to(tl.float32) * scale[:, :, None]
        second = tl.load(code_book + high).to(tl.float32) * scale[:, :, None]
    return first, second


@triton.jit
def load_word(pages, place, mask):
    """Byte ``place`` (int64) of the pool in the low bits of an int32; bytes behind it above."""
    words = tl.load(pages.to(tl.pointer_type(tl.int32)) + (place >> 2), mask=mask, other=0)
    return words >> ((place & 3) * 8).to(tl.int32)


@triton.jit
def load_bfloat16(pages, place, mask):
    """bfloat16 numbers from even bytes ``place`` (int64) of the pool on, as float32."""
    return (load_word(pages, place, mask) << 16).to(tl.float32, bitcast=True)


@triton.jit
def decode_float8(codes):
    """Unsigned 8-bit floats as float32; see ``float8_decode``."""
    return ((codes.to(tl.int32) + FLOAT8_EXPONENT) << 19).to(tl.float32, bitcast=True)


def page_constants(layout: PageLayout) -> dict[str, Any]:
    """What a kernel must know of a layout when it is compiled."""
    constants: dict[str, Any] = {
        "N": layout.page_tokens,
        "D": layout.head_dim,
        "D_PADDED": triton.next_power_of_2(layout.head_dim),
    }
    for name, half in (("KEY", layout.keys), ("VALUE", layout.values)):
        constants |= {
            f"{name}_FORMAT": half.format.kernel_name,
            f"{name}_DOUBLE": half.format.group_bytes > 0,
            f"{name}_CODES": half.codes_offset,
            f"{name}_GROUP": half.group_offset,
            f"{name}_SCALES": half.scales_offset,
            f"{name}_BLOCK": half.format.block_values(layout.head_dim),
        }
    return constants
