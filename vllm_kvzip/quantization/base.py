"""What a format of quantized vectors is: all that the rest of the package asks of one.

How it encodes vectors and how many bytes that takes; how a CPU reads them quickly; and the Triton
code with which GPUs write and read pages. Nothing else tells one format from another, so that a new
one is one file, and one more with Triton code if it shall run on GPUs.

A format encodes the keys, or the values, of one head page. Vectors are cut into blocks of
``block_size`` values that share a scale. A format may also share something among all vectors of a
page, its group scale. Encoders choose codes against the scale as it is stored, so that no error
comes from rounding the scale but where it makes a value fall off the end of the codes.

What was decoded gives the same numbers when it is encoded again, in whatever page. Budgets in
tokens rely on it: in each round vectors that stay quantized move to other pages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from vllm_kvzip.registry import FORMATS

if TYPE_CHECKING:
    from typing import Self

    from vllm_kvzip.kernels.quantized_tiles import PageCode

SMALLEST_BLOCK = 16

register_format = FORMATS.register
"""Make a format available under its name; usable as a class decorator."""


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
        name: as in the configuration.
        code_book: float16, what the Triton code looks codes up in; None for formats that compute.
            Keys and values that are both looked up must be so in one code book.
    """

    name: ClassVar[str]
    code_book: ClassVar[torch.Tensor | None] = None

    @classmethod
    @abstractmethod
    def for_head_size(cls, head_dim: int) -> Self:
        """The format with the block size that suits a head size, and pages of few tokens.

        Raises:
            ValueError: if none does.
        """

    @property
    def group_bytes(self) -> int:
        """Bytes of the group scale: 0, or 4 of a float32."""
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
            vectors: float32, bfloat16 or float16 ``[..., N, D]``, finite. Those that
                :meth:`decode` made must be decoded to the same numbers again.

        Raises:
            ValueError: if D does not suit the format.
        """

    @abstractmethod
    def decode(self, encoded: Encoded) -> torch.Tensor:
        """What is left of the vectors: float32 ``[..., N, D]``, finite."""

    def reading_order(self, head_dim: int) -> torch.Tensor:
        """Which dimension is in which column of :meth:`read`: int64 ``[D]``."""
        return torch.arange(head_dim)

    def read(self, encoded: Encoded) -> torch.Tensor:
        """As :meth:`decode`, as quickly as torch does it on a CPU: attention calls it.

        Every number is the same, but its column is that of :meth:`reading_order`. The default is
        :meth:`decode`.
        """
        return self.decode(encoded)

    @property
    def page_code(self) -> PageCode | None:
        """Triton code that fills and reads pages; None: the format works on CPUs only.

        Imports Triton when it is asked for.
        """
        return None

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


def fitting_block_size(name: str, head_dim: int, largest: int) -> int:
    """The largest block size that divides the head size: ``largest``, its half, and so on.

    Raises:
        ValueError: if not even :data:`SMALLEST_BLOCK` does.
    """
    size = largest
    while size > SMALLEST_BLOCK and head_dim % size:
        size //= 2
    if head_dim % size:
        raise ValueError(f"{name} does not suit head size {head_dim}, no multiple of {size}")
    return size


def check_block_size(name: str, block_size: int) -> None:
    """Blocks of 4-bit codes are powers of two from 16 on: half of one is a run of bytes.

    Raises:
        ValueError: if the block size is no such number.
    """
    if block_size < SMALLEST_BLOCK or block_size & (block_size - 1):
        raise ValueError(f"{name}: the block size must be a power of two from 16, not {block_size}")
