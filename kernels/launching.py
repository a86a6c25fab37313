"""How kernels run: compiled for a card, or in Triton's interpreter on the CPU."""

from __future__ import annotations

import torch
import triton

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run on CPU tensors (``TRITON_INTERPRET=1``, read when they are decorated).

bfloat16 arithmetic is wrong there, so kernels cast to float32 right after each load.
"""


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a matrix product: no rounding to tf32 for float32 inputs."""
    return "ieee" if dtype is torch.float32 or INTERPRETED else "tf32"
