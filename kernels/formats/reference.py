"""What the ``load`` functions of this folder compute, literally, in plain torch.

The layout of a page is in ``vllm_kvzip/quantization/layout.py``; here are only bytes and offsets,
as the kernels get them. Byte ``j`` of a block of 4-bit codes holds value ``j`` in its low half and
value ``j + BLOCK / 2`` in its high half.
"""

from __future__ import annotations

import torch


def read_reference(
    kind: str,
    pages: torch.Tensor,
    num_tokens: int,
    head_dim: int,
    *,
    codes: int,
    group: int,
    scales: int,
    block: int,
    code_book: torch.Tensor | None = None,
) -> torch.Tensor:
    """Keys, or values, of whole pages.

    Args:
        kind: ``int8``, ``int4``, ``nf4`` or ``double nf4``.
        pages: uint8 ``[P, page_bytes]``.
        num_tokens: tokens of a page.
        head_dim: D.
        codes, group, scales: offsets in bytes of the codes, of the group scale and of the scales.
        block: values that share a scale.
        code_book: 16 levels of ``nf4``.

    Returns:
        float32 ``[P, num_tokens, D]``.
    """
    if kind == "int8":
        stored = pages[:, codes : codes + num_tokens * head_dim].contiguous().view(torch.int8)
        factor = bfloat16_at(pages, scales, num_tokens)
        return stored.view(-1, num_tokens, head_dim).float() * factor[..., None]
    blocks = head_dim // block
    packed = pages[:, codes : codes + num_tokens * head_dim // 2]
    packed = packed.reshape(-1, num_tokens, blocks, block // 2)
    code = torch.cat([packed & 15, packed >> 4], dim=-1)
    if kind == "int4":  # a block's scales of a token come first, then their zero points
        both = bfloat16_at(pages, scales, num_tokens * 2 * blocks).view(-1, num_tokens, 2, blocks)
        scale, zero = both[:, :, 0, :, None], both[:, :, 1, :, None]
        return (zero + code.float() * scale).flatten(2)
    assert code_book is not None
    levels = code_book.float()[code.long()]
    if kind == "nf4":
        scale = bfloat16_at(pages, scales, num_tokens * blocks)
    else:
        byte = pages[:, scales : scales + num_tokens * blocks].int()
        small = (1 + (byte & 15) / 16) * torch.exp2((byte >> 4).float() - 15)
        scale = small * pages[:, group : group + 4].contiguous().view(torch.float32)
    return (levels * scale.view(-1, num_tokens, blocks, 1)).flatten(2)


def bfloat16_at(pages: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Numbers of two bytes from byte ``first`` of each page on, as float32 ``[P, count]``."""
    return pages[:, first : first + 2 * count].contiguous().view(torch.bfloat16).float()
