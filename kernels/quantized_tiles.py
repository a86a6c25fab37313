"""What Triton code of quantized pages shares: words, scales and 4-bit codes out of a page's bytes.

``vllm_kvzip.quantization`` has the formats and the layout of a page. The Triton code of a format is
a :class:`PageCode`; ``formats/`` has those of this package. Kernels get its functions as constants,
so a kernel is compiled with the code of the formats of its keys and its values, and knows no format
itself. The plain-torch reference is ``unpack_pages`` (``quantization/pages.py``), of which every
bit is the same: products are made in one order, and those with which a compiler could fuse an
addition are exact.

The 4-bit codes of a block lie two a byte, the second half of the block in the high bits. A tile of
bytes is unpacked by a mask and a shift into two tiles that share their scales; nothing moves
between threads. Scales, which are to be there in time, are taken out of words of four bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import triton
import triton.language as tl

if TYPE_CHECKING:

    class Format(Protocol):
        """What kernels want to know of a format; see ``quantization/base.py``."""

        @property
        def name(self) -> str: ...
        @property
        def page_code(self) -> PageCode | None: ...
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
"""As in ``quantization/packing.py``."""


@dataclass(frozen=True)
class PageCode:
    """The Triton code of a format: two ``triton.jit`` functions.

    In both, ``pages`` points to bytes, and words in capitals are constants: bytes from the
    beginning of a page to its codes, its group scale and its scales (``quantization/layout.py``),
    values that share a scale, tokens of a page, the head size, and the power of two from it on.

    Attributes:
        load: ``load(pages, page, page_stride, in_page, wanted, code_book, CODES, GROUP, SCALES,
            BLOCK, D, D_PADDED)`` decodes the keys, or the values, of some tokens: float32
            ``[TOKENS, D_PADDED]``. ``page`` (int64) and ``in_page`` say where each token lies,
            ``[TOKENS]``. What is not ``wanted``, and what has a dimension of D or more, is neither
            read nor other than zero.
        store: ``store(vectors, rows, vector_stride, pages, page, page_stride, index, code_book,
            CODES, GROUP, SCALES, BLOCK, N, D, D_PADDED, TOKENS)`` fills the keys, or the values, of
            page ``page`` (int64), TOKENS at a time. Its N tokens are the rows of ``vectors`` whose
            numbers are in ``rows`` from ``index * N`` on, and zeros where that is -1.
    """

    load: Any
    store: Any


@triton.jit
def wanted_blocks(wanted, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Which blocks of which tokens there are, ``[TOKENS, D_PADDED / BLOCK]``."""
    blocks = tl.arange(0, D_PADDED // BLOCK)
    return wanted[:, None] & (blocks < D // BLOCK)[None, :]


@triton.jit
def load_nibbles(
    pages, page, page_stride, in_page, there, CODES: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D_PADDED: tl.constexpr,
):  # fmt: skip
    """The 4-bit codes of the first and of the second half of every block of some tokens.

    Both are int32 ``[TOKENS, D_PADDED / BLOCK, BLOCK / 2]``; ``there`` is of :func:`wanted_blocks`.
    """
    blocks = tl.arange(0, D_PADDED // BLOCK)
    inner = tl.arange(0, BLOCK // 2)
    place = (page * page_stride + CODES + in_page * (D // 2))[:, None]
    place = place + blocks[None, :] * (BLOCK // 2)
    packed = tl.load(
        pages + place[:, :, None] + inner[None, None, :], mask=there[:, :, None], other=0
    )
    return (packed & 15).to(tl.int32), (packed >> 4).to(tl.int32)


@triton.jit
def join_halves(low, high, TOKENS: tl.constexpr, D_PADDED: tl.constexpr):
    """The first and the second half of every block in one tile, ``[TOKENS, D_PADDED]``."""
    both = tl.permute(tl.join(low, high), (0, 1, 3, 2))
    return tl.reshape(both, (TOKENS, D_PADDED))


@triton.jit
def load_word(pages, place, mask):
    """Byte ``place`` (int64) of the pool in the low bits of an int32; the bytes after it above."""
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
            f"{name}_CODES": half.codes_offset,
            f"{name}_GROUP": half.group_offset,
            f"{name}_SCALES": half.scales_offset,
            f"{name}_BLOCK": half.format.block_values(layout.head_dim),
        }
    return constants


def load_functions(layout: PageLayout) -> dict[str, Any]:
    """The functions that read keys and values, as constants of a kernel.

    Raises:
        ValueError: if a format has no Triton code.
    """
    return {
        "KEY_LOAD": _code_of(layout.keys.format).load,
        "VALUE_LOAD": _code_of(layout.values.format).load,
    }


def store_functions(layout: PageLayout) -> dict[str, Any]:
    """The functions that write keys and values; see :func:`load_functions`."""
    return {
        "KEY_STORE": _code_of(layout.keys.format).store,
        "VALUE_STORE": _code_of(layout.values.format).store,
    }


def _code_of(used: Format) -> PageCode:
    code = used.page_code
    if code is None:
        raise ValueError(f"format {used.name} has no Triton code, so kernels cannot use it")
    return code
