"""How codes and scales are packed into bytes.

4-bit codes lie two a byte, so that a kernel unpacks a tile without moving values between threads:
byte ``j`` of a block of B values holds value ``j`` in its low half and value ``j + B / 2`` in its
high half. So a tile of bytes becomes two tiles of values with a mask and a shift, one scale serves
both halves of a byte, and a run of bytes is a run of values.

Scales are bfloat16, or unsigned 8-bit floats under a scale of the page. bfloat16 has the range of
float32, so that no input makes a scale infinite, and becomes a float32 by a shift. Its eight
significant bits times a code of eight bits are exact in float32: a kernel may fuse the addition of
a zero point and still gives the same bits.
"""

from __future__ import annotations

import torch

LARGEST = 2.0**126
"""Magnitudes above it are taken as it, so that ranges and what is decoded stay finite."""

SMALLEST_SCALE = 2.0**-100
"""Of a block; all-zero blocks have it and need no case of their own."""

LARGEST_FLOAT8 = 1.9375
"""Of an unsigned 8-bit float as stored here: 4 exponent bits, bias 15, and 4 mantissa bits."""

SPAN_OF_16 = (1 - 2**-16) / 15
"""From the span of a block to the step between its 16 codes. A little less than a fifteenth, so
that rounding errors never give a block that was decoded a larger step than it had."""

_FLOAT8_EXPONENT = (127 - 15) << 4  # between this float's exponent field and float32's
_MANTISSA_SHIFT = 19  # between 4 and 23 mantissa bits


def bfloat16_up(values: torch.Tensor) -> torch.Tensor:
    """float32, not negative -> the next bfloat16 that is not smaller."""
    return ((values.view(torch.int32) + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def bfloat16_down(values: torch.Tensor) -> torch.Tensor:
    """float32 -> the next bfloat16 that is not larger."""
    bits = values.view(torch.int32)
    away_from_zero = (bits >> 31) & 0xFFFF  # for negative values only
    return ((bits + away_from_zero) >> 16).to(torch.int16).view(torch.bfloat16)


def power_of_two_up(values: torch.Tensor) -> torch.Tensor:
    """float32, normal and positive -> the next power of two that is not smaller."""
    return ((values.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def float8_encode(values: torch.Tensor) -> torch.Tensor:
    """Nearest unsigned 8-bit float, code ``16 * e + m`` for ``(1 + m / 16) * 2 ** (e - 15)``.

    Args:
        values: float32, positive; taken as the nearest end of the range when outside it, which is
            ``2**-15`` to 1.9375.

    Returns:
        uint8, like ``values``. The relative error is at most 1/32.
    """
    bits = values.view(torch.int32)
    rounded = (bits + (1 << (_MANTISSA_SHIFT - 1))) >> _MANTISSA_SHIFT
    return (rounded - _FLOAT8_EXPONENT).clamp(0, 255).to(torch.uint8)


def float8_decode(codes: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32; see :func:`float8_encode`."""
    return ((codes.to(torch.int32) + _FLOAT8_EXPONENT) << _MANTISSA_SHIFT).view(torch.float32)


def as_bytes(scales: torch.Tensor) -> torch.Tensor:
    """``[..., n]`` of any dtype as uint8 ``[..., n * itemsize]``."""
    return scales.contiguous().view(torch.uint8)


def in_blocks(vectors: torch.Tensor, block_size: int) -> torch.Tensor:
    """``[..., blocks * B]`` -> ``[..., blocks, B]``."""
    return vectors.reshape(*vectors.shape[:-1], -1, block_size)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 ``[..., blocks, B]`` below 16 -> uint8 ``[..., blocks * B / 2]``."""
    low, high = codes.chunk(2, dim=-1)
    return (low | (high << 4)).flatten(-2)


def unpack_nibbles(packed: torch.Tensor, block_size: int) -> torch.Tensor:
    """uint8 ``[..., blocks * B / 2]`` -> uint8 ``[..., blocks, B]``."""
    blocks = in_blocks(packed, block_size // 2)
    return torch.cat([blocks & 15, blocks >> 4], dim=-1)


def halves_side_by_side(head_dim: int, block_size: int) -> torch.Tensor:
    """Which dimension is in which column of :func:`read_nibbles`: int64 ``[D]``."""
    halves = torch.arange(head_dim).view(-1, 2, block_size // 2)
    return halves.transpose(1, 2).flatten()


def byte_table(levels: torch.Tensor) -> torch.Tensor:
    """A table for :func:`read_nibbles`: int64 ``[256]``, two float32 of each byte.

    Args:
        levels: float32 ``[16]``, the number of each code.
    """
    byte = torch.arange(256)
    both = torch.stack([levels[byte % 16], levels[byte // 16]], dim=1)
    return both.view(torch.int64).flatten()


def read_nibbles(packed: torch.Tensor, table: torch.Tensor, block_size: int) -> torch.Tensor:
    """As :func:`unpack_nibbles`, both codes of a byte looked up at once; for CPUs.

    Args:
        packed: uint8 ``[..., blocks * B / 2]``.
        table: of :func:`byte_table`.
        block_size: B.

    Returns:
        float32 ``[..., blocks, B]``, where the two numbers of a byte lie side by side.
    """
    index = packed.reshape(-1).to(torch.int32)
    numbers = table.index_select(0, index).view(torch.float32)
    return numbers.view(*packed.shape[:-1], -1, block_size)
