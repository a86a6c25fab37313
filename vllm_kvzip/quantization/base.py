"""What a format of quantized vectors is: how it encodes them, and how many bytes that takes.

A format encodes the keys, or the values, of one head page. Vectors are cut into blocks of
``block_size`` values that share a scale. A format may also share something among all vectors of a
page, its group scale. Encoders choose codes against the scale as it is stored, so that no error
comes from rounding the scale but where it makes a value fall off the end of the codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Encoded:
    """Quantized vectors of some groups; a group is what shares a group scale, one page.

    Attributes:
        codes: uint8 ``[..., N, code bytes]``.
        scales: uint8 ``[..., N, scale bytes]``, the bytes as they are stored.
        group_scale: float32 ``[...]``; None for formats without one.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    group_scale: torch.Tensor | None = None


class Format(ABC):
    """Encodes vectors of D values; subclasses say how.

    Finite vectors give finite vectors: magnitudes above ``2**126`` are taken as ``2**126``, and a
    scale is never smaller than ``2**-100``. Vectors with infinities or NaN are not supported.

    Attributes:
        name: as people write it.
        kernel_name: which branch of the Triton kernels reads and writes it.
        group_bytes: bytes of the group scale, 0 or 4.
        code_book: float16 ``[16]``, what kernels look codes up in; None for formats that compute.
    """

    name: ClassVar[str]
    kernel_name: ClassVar[str]
    code_book: ClassVar[torch.Tensor | None] = None

    @property
    def group_bytes(self) -> int:
        """Bytes of the group scale."""
        return 0

    @abstractmethod
    def block_values(self, head_dim: int) -> int:
        """Values that share a scale, for head size ``head_dim``.

        Raises:
            ValueError: if a vector is not made of whole blocks.
        """

    @abstractmethod
    def code_bytes(self, head_dim: int) -> int:
        """Bytes of the codes of one vector."""

    @abstractmethod
    def scale_bytes(self, head_dim: int) -> int:
        """Bytes of the scales, and zero points, of one vector."""

    @abstractmethod
    def encode(self, vectors: torch.Tensor) -> Encoded:
        """Quantize the keys, or the values, of some pages.

        Args:
            vectors: float32, bfloat16 or float16 ``[..., N, D]``, finite.

        Raises:
            ValueError: if D does not suit the format.
        """

    @abstractmethod
    def decode(self, encoded: Encoded) -> torch.Tensor:
        """What is left of the vectors: float32 ``[..., N, D]``, finite."""

    def vector_bytes(self, head_dim: int) -> int:
        """Bytes of one vector, all scales but the group's included."""
        return self.code_bytes(head_dim) + self.scale_bytes(head_dim)

    def bits_per_value(self, head_dim: int, page_tokens: int) -> float:
        """Bits per value, all scales included, of a page of ``page_tokens`` vectors."""
        total = page_tokens * self.vector_bytes(head_dim) + self.group_bytes
        return 8 * total / (page_tokens * head_dim)


def whole_blocks(name: str, head_dim: int, block_size: int) -> int:
    """``block_size`` if it suits the head size.

    Raises:
        ValueError: if not.
    """
    if head_dim % block_size:
        raise ValueError(
            f"{name}: a head size of {head_dim} is not made of whole blocks of {block_size} values"
        )
    return block_size


def check_block_size(name: str, block_size: int) -> None:
    """Blocks of 4-bit codes are powers of two from 16 on: half of one is a run of bytes.

    Raises:
        ValueError: if the block size is no such number.
    """
    if block_size < 16 or block_size & (block_size - 1):
        raise ValueError(f"{name}: the block size must be a power of two from 16, not {block_size}")
