"""4-bit NormalFloat of QLoRA (arXiv 2305.14314, section 3 and appendix E); double quantization.

Its 16 levels are quantiles of the normal distribution, scaled to [-1, 1], with an exact zero. A
block of a vector is divided by its largest magnitude and each value takes the nearest level. With
bfloat16 scales a value costs ``4 + 16 / block_size`` bits. Double quantization (section 3 of the
paper) stores the scales as 8-bit floats under one float32 scale for all keys, or all values, of a
page: ``4 + 8 / block_size`` bits and the page's four bytes. Scales are positive, so these floats
have no sign, and the paper's subtraction of the mean is not needed. The page's scale is a power of
two: so a vector that moves to another page keeps the mantissa of its scales, and all its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
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
    LARGEST_FLOAT8,
    SMALLEST_SCALE,
    as_bytes,
    byte_table,
    float8_decode,
    float8_encode,
    halves_side_by_side,
    in_blocks,
    pack_nibbles,
    power_of_two_up,
    read_nibbles,
    unpack_nibbles,
)

if TYPE_CHECKING:
    from vllm_kvzip.kernels.quantized_tiles import PageCode


def normal_float_levels() -> torch.Tensor:
    """The code book, float32 ``[16]``, ascending.

    Evenly spaced probabilities give eight levels from zero up and seven below it; the outermost
    one is the mean of ``1 - 1 / (2 * 15)`` and ``1 - 1 / (2 * 16)``, as in the authors' code.
    """
    outermost = 1 - (1 / (2 * 15) + 1 / (2 * 16)) / 2

    def quantiles(count: int) -> torch.Tensor:
        probabilities = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float64)
        found: torch.Tensor = torch.special.ndtri(probabilities[:-1])
        return found

    zero = torch.zeros(1, dtype=torch.float64)
    levels: torch.Tensor = torch.cat([-quantiles(7), zero, quantiles(8)]).sort().values
    return (levels / levels.max()).float()


CODE_BOOK = normal_float_levels().half()
"""float16 ``[16]``, off by less than one in 2,048.

Two bytes are what kernels want to look up: loads of four would be copied through shared memory by
Triton's pipeliner, one by one.
"""

LEVELS = CODE_BOOK.float()
BYTE_TABLE = byte_table(LEVELS)
BOUNDARIES = (LEVELS[1:] + LEVELS[:-1]) / 2
"""float32 ``[15]``; a value above boundary ``i`` is nearer to level ``i + 1`` than to ``i``."""


@register_format
@dataclass(frozen=True)
class NormalFloat4(Format):
    """A value is ``level[code] * scale``.

    Attributes:
        block_size: values that share a scale.
        double_quantization: 8-bit scales under a scale of the page, instead of bfloat16 scales.

    Raises:
        ValueError: if the block size is no power of two from 16 on.
    """

    name = "nf4"
    code_book = CODE_BOOK

    block_size: int = 64
    double_quantization: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_block_size(self.name, self.block_size)

    @classmethod
    def for_head_size(cls, head_dim: int) -> NormalFloat4:
        """See :class:`Format`; blocks of 32 values, whose scales are quantized too, or of 16."""
        return cls(fitting_block_size(cls.name, head_dim, 32), double_quantization=True)

    @property
    def group_bytes(self) -> int:
        return 4 if self.double_quantization else 0

    def block_values(self, head_dim: int) -> int:
        return whole_blocks(self.name, head_dim, self.block_size)

    def code_bytes(self, head_dim: int) -> int:
        return head_dim // 2

    def scale_bytes(self, head_dim: int) -> int:
        return head_dim // self.block_values(head_dim) * (1 if self.double_quantization else 2)

    def encode(self, vectors: torch.Tensor) -> Encoded:
        """See :class:`Format`."""
        size = self.block_values(vectors.shape[-1])
        blocks = in_blocks(vectors.float().clamp(-LARGEST, LARGEST), size)
        exact = blocks.abs().amax(dim=-1).clamp(min=SMALLEST_SCALE)  # [..., N, blocks]
        group = None
        if self.double_quantization:
            group = power_of_two_up(exact.amax(dim=(-2, -1)) * (1 / LARGEST_FLOAT8))
            stored = float8_encode(exact / group[..., None, None])
            scale = float8_decode(stored) * group[..., None, None]
        else:
            stored = exact.bfloat16()
            scale = stored.float()
        boundaries = BOUNDARIES.to(blocks.device)
        codes = torch.bucketize(blocks / scale[..., None], boundaries).to(torch.uint8)
        return Encoded(pack_nibbles(codes), as_bytes(stored), group)

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """See :class:`Format`."""
        scale = self._scales(encoded)
        codes = unpack_nibbles(encoded.codes, self.block_size)
        levels = LEVELS.to(codes.device)[codes.int()]
        return (levels * scale[..., None]).flatten(-2)

    def reading_order(self, head_dim: int) -> torch.Tensor:
        """See :class:`Format`; the two values that share a byte lie side by side."""
        return halves_side_by_side(head_dim, self.block_size)

    def read(self, encoded: Encoded) -> torch.Tensor:
        """See :class:`Format`; looks up two codes at once."""
        blocks = read_nibbles(encoded.codes, BYTE_TABLE, self.block_size)
        blocks *= self._scales(encoded)[..., None]
        return blocks.flatten(-2)

    def _scales(self, encoded: Encoded) -> torch.Tensor:
        """float32 ``[..., N, blocks]``."""
        if encoded.group_scale is not None:
            return float8_decode(encoded.scales) * encoded.group_scale[..., None, None]
        return encoded.scales.contiguous().view(torch.bfloat16).float()

    @property
    def page_code(self) -> PageCode:
        """See :class:`Format`."""
        from vllm_kvzip.kernels.formats.nf4 import DOUBLE_PAGE_CODE, PAGE_CODE

        return DOUBLE_PAGE_CODE if self.double_quantization else PAGE_CODE
