"""4-bit integers with a scale and a zero point per block of a vector.

Asymmetric round-to-nearest quantization, as KIVI (arXiv 2402.02750, section 3) does along the
channels of a token: the block's smallest value becomes code 0 and its largest code 15. Zero point
and scale are bfloat16, rounded so that the codes still span the block; a value costs
``4 + 32 / block_size`` bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.quantization.base import (
    Encoded,
    Format,
    check_block_size,
    fitting_block_size,
    register_format,
    whole_blocks,
)
from vllm_kvzip.quantization.packing import (
    LARGEST,
    SMALLEST_SCALE,
    SPAN_OF_16,
    as_bytes,
    bfloat16_down,
    bfloat16_up,
    byte_table,
    halves_side_by_side,
    in_blocks,
    pack_nibbles,
    read_nibbles,
    unpack_nibbles,
)

if TYPE_CHECKING:
    from vllm_kvzip.kernels.quantized_tiles import PageCode

BYTE_TABLE = byte_table(torch.arange(16).float())


@register_format
@dataclass(frozen=True)
class Int4(Format):
    """A value is ``zero + code * scale``; a vector stores its scales, then its zero points.

    A zero point of zero is stored without a sign.

    Attributes:
        block_size: values that share a scale and a zero point.

    Raises:
        ValueError: if the block size is no power of two from 16 on.
    """

    name = "int4"

    block_size: int = 64

    def __post_init__(self) -> None:
        check_block_size(self.name, self.block_size)

    @classmethod
    def for_head_size(cls, head_dim: int) -> Int4:
        """See :class:`Format`; blocks of 64 values, fewer where the head size is no multiple."""
        return cls(fitting_block_size(cls.name, head_dim, 64))

    def block_values(self, head_dim: int) -> int:
        return whole_blocks(self.name, head_dim, self.block_size)

    def code_bytes(self, head_dim: int) -> int:
        return head_dim // 2

    def scale_bytes(self, head_dim: int) -> int:
        return head_dim // self.block_values(head_dim) * 4

    def encode(self, vectors: torch.Tensor) -> Encoded:
        """See :class:`Format`."""
        size = self.block_values(vectors.shape[-1])
        blocks = in_blocks(vectors.float().clamp(-LARGEST, LARGEST), size)
        zero = bfloat16_down(blocks.amin(dim=-1) + 0.0)
        spread = (blocks.amax(dim=-1) - zero.float()) * SPAN_OF_16
        scale = bfloat16_up(spread.clamp(min=SMALLEST_SCALE))
        from_zero = blocks - zero.float()[..., None]
        codes = (from_zero / scale.float()[..., None] + 0.5).floor().clamp(0, 15)
        packed = pack_nibbles(codes.to(torch.uint8))
        return Encoded(packed, as_bytes(torch.cat([scale, zero], dim=-1)))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """See :class:`Format`."""
        scale, zero = encoded.scales.contiguous().view(torch.bfloat16).float().chunk(2, dim=-1)
        codes = unpack_nibbles(encoded.codes, self.block_size).float()
        return (zero[..., None] + codes * scale[..., None]).flatten(-2)

    def reading_order(self, head_dim: int) -> torch.Tensor:
        """See :class:`Format`; the two values that share a byte lie side by side."""
        return halves_side_by_side(head_dim, self.block_size)

    def read(self, encoded: Encoded) -> torch.Tensor:
        """See :class:`Format`; looks up two codes at once."""
        scale, zero = encoded.scales.contiguous().view(torch.bfloat16).float().chunk(2, dim=-1)
        blocks = read_nibbles(encoded.codes, BYTE_TABLE, self.block_size)
        blocks *= scale[..., None]
        blocks += zero[..., None]
        return blocks.flatten(-2)

    @property
    def page_code(self) -> PageCode:
        """See :class:`Format`."""
        from vllm_kvzip.kernels.formats.int4 import PAGE_CODE

        return PAGE_CODE
