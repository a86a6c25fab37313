"""4-bit codes, two a byte, so that a kernel unpacks a tile without moving values between threads.

Byte ``j`` of a block of B values holds value ``j`` in its low half and value ``j + B / 2`` in its
high half. So a tile of bytes becomes two tiles of values with a mask and a shift, one scale serves
both halves of a byte, and a run of bytes is a run of values.
"""

from __future__ import annotations

import torch


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
