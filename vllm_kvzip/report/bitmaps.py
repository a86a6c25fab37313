"""Which tokens some heads keep, as bits.

Head by head, each in whole bytes: token ``t`` is bit ``t % 8`` of a head's byte ``t // 8``, the
lowest bit first. So the bytes of a head, read as one little-endian number, are a mask whose bit
``t`` is token ``t``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def pack(heads: Iterable[Iterable[int]], num_tokens: int) -> bytes:
    """Bits of the tokens that each head keeps.

    Args:
        heads: positions of each head's tokens.
        num_tokens: that there are.
    """
    size = row_bytes(num_tokens)
    masks = (sum(1 << token for token in set(head)) for head in heads)
    return b"".join(mask.to_bytes(size, "little") for mask in masks)


def unpack(bits: bytes, num_heads: int, num_tokens: int) -> list[int]:
    """The mask of each head; see the module docstring.

    Args:
        bits: of all heads.
        num_heads: how many these are.
        num_tokens: that there are.

    Raises:
        ValueError: if there are more or fewer bytes, or a bit of no token is set.
    """
    size = row_bytes(num_tokens)
    if len(bits) != num_heads * size:
        raise ValueError(f"{len(bits)} bytes, not {num_heads * size}")
    starts = range(0, len(bits), size) if size else [0] * num_heads
    masks = [int.from_bytes(bits[start : start + size], "little") for start in starts]
    if any(mask >> num_tokens for mask in masks):
        raise ValueError(f"a bit behind the last of {num_tokens} tokens is set")
    return masks


def row_bytes(num_tokens: int) -> int:
    """Bytes of one head."""
    return (num_tokens + 7) // 8
