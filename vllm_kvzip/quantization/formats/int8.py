"""8-bit integers with one scale per vector, that is per token and head.

Symmetric absolute-maximum quantization (LLM.int8(), arXiv 2208.07339, section 2): the largest
magnitude of a vector becomes code 127. The scale is a bfloat16, so a value costs
``8 + 16 / D`` bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.quantization.base import Encoded, Format, register_format
from vllm_kvzip.quantization.packing import LARGEST, SMALLEST_SCALE, as_bytes

if TYPE_CHECKING:
    from vllm_kvzip.kernels.quantized_tiles import PageCode


@register_format
@dataclass(frozen=True)
class Int8(Format):
    """A value is ``code * scale``, with codes of -127 to 127 in two's complement."""

    name = "int8"

    @classmethod
    def for_head_size(cls, head_dim: int) -> Int8:
        """See :class:`Format`; suits any."""
        return cls()

    def block_values(self, head_dim: int) -> int:
        return head_dim

    def code_bytes(self, head_dim: int) -> int:
        return head_dim

    def scale_bytes(self, head_dim: int) -> int:
        return 2

    def encode(self, vectors: torch.Tensor) -> Encoded:
        """See :class:`Format`."""
        x = vectors.float().clamp(-LARGEST, LARGEST)
        largest = x.abs().amax(dim=-1, keepdim=True)
        scale = (largest * (1 / 127)).clamp(min=SMALLEST_SCALE).bfloat16()
        codes = (x / scale.float() + 0.5).floor().clamp(-127, 127)
        return Encoded(codes.to(torch.int8).view(torch.uint8), as_bytes(scale))

    def decode(self, encoded: Encoded) -> torch.Tensor:
        """See :class:`Format`."""
        scale = encoded.scales.contiguous().view(torch.bfloat16)
        return encoded.codes.contiguous().view(torch.int8).float() * scale.float()

    def read(self, encoded: Encoded) -> torch.Tensor:
        """See :class:`Format`; scaled in place."""
        numbers = encoded.codes.contiguous().view(torch.int8).float()
        numbers *= encoded.scales.contiguous().view(torch.bfloat16).float()
        return numbers

    @property
    def page_code(self) -> PageCode:
        """See :class:`Format`."""
        from vllm_kvzip.kernels.formats.int8 import PAGE_CODE

        return PAGE_CODE
