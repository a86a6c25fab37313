"""In which order vLLM's CPU kernel stores the elements of a head page.

First the keys, then the values, each packed in an order that suits the instruction set. It is found
by storing a known pattern through vLLM's own op, so nothing about it is assumed.
"""

from __future__ import annotations

import torch

from vllm_kvzip.storage.page_store import PageCodec
from vllm_kvzip.vllm_bridge.symbols import custom_ops as ops

_DIGIT = 64  # small enough to be exact in every cache dtype, bfloat16 and float8 excepted


def discover_codec(block_size: int, head_dim: int, dtype: torch.dtype, isa: str) -> PageCodec:
    """Find the element order of the CPU kernel inside one head page.

    Writes the numbers ``0 .. block_size * head_dim - 1``, one base-64 digit at a time so that every
    digit is exact in ``dtype``, through vLLM's own cache op and reads where they went.

    Args:
        block_size: tokens per page.
        head_dim: elements per key, and per value.
        dtype: the cache's dtype (float32, bfloat16 or float16).
        isa: vLLM's name of the instruction set variant of its attention kernel.
    """
    size = block_size * head_dim
    index = torch.arange(size)
    key_order = torch.zeros(size, dtype=torch.int64)
    value_order = torch.zeros(size, dtype=torch.int64)
    weight = 1
    while weight < size:
        digit = (index // weight % _DIGIT).view(block_size, 1, head_dim).to(dtype)
        page = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=dtype)
        key_page, value_page = page.chunk(2, dim=2)
        slots = torch.arange(block_size, dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(digit, digit, key_page, value_page, slots, isa)
        stored = page.view(2, size).to(torch.int64)
        key_order += stored[0] * weight
        value_order += stored[1] * weight
        weight *= _DIGIT
    return PageCodec(key_order=key_order, value_order=value_order)
