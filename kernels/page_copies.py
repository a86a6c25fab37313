"""Compaction: copy the kept KV pairs of a request into whole head pages, all layers in one launch.

Each target page is filled by one program: it reads N rows of keys and of values from wherever
they lie in the prompt's pages and writes them side by side. Sources and targets must differ.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    import torch


@triton.jit(do_not_specialize=["source_stride"])
def copy_kept(
    key_pages, value_pages, source_pages, positions, page_heads, target_pages,
    source_stride, page_stride, token_stride,
    D: tl.constexpr, D_PADDED: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Fill one target page; grid ``(target pages,)``. N is a power of two."""
    index = tl.program_id(0)
    tokens = tl.arange(0, N)
    dims = tl.arange(0, D_PADDED)
    kept = tl.load(positions + index.to(tl.int64) * N + tokens)
    head = tl.load(page_heads + index).to(tl.int64)
    source = tl.load(source_pages + head * source_stride + kept // N).to(tl.int64)
    target = tl.load(target_pages + index).to(tl.int64)
    start = source * page_stride + kept % N * token_stride
    read = start[:, None] + dims[None, :]
    mask = (dims < D)[None, :]
    k = tl.load(key_pages + read, mask=mask)
    v = tl.load(value_pages + read, mask=mask)
    write = target * page_stride + (tokens * token_stride)[:, None] + dims[None, :]
    tl.store(key_pages + write, k, mask=mask)
    tl.store(value_pages + write, v, mask=mask)


def compact_pages(
    key_pages: torch.Tensor,
    value_pages: torch.Tensor,
    source_pages: torch.Tensor,
    positions: torch.Tensor,
    page_heads: torch.Tensor,
    target_pages: torch.Tensor,
) -> None:
    """Copy the kept KV pairs of one request, bit for bit.

    Args:
        key_pages, value_pages: ``[P, N, D]`` with the same strides, rows contiguous; the pages in
            ``target_pages`` are written.
        source_pages: int32 ``[L * H, n]``, the pages of the prompt.
        positions: int32 ``[len(target_pages) * N]``, kept positions in the order of the targets.
        page_heads: int32 ``[len(target_pages)]``, ``l * H + h`` of each target page.
        target_pages: int32, none of them among ``source_pages``.

    Raises:
        ValueError: for pages whose strides differ between keys and values.
    """
    if key_pages.stride() != value_pages.stride() or key_pages.stride(2) != 1:
        raise ValueError("key and value pages must have the same strides and contiguous rows")
    _, page_tokens, head_dim = key_pages.shape
    copy_kept[(len(target_pages),)](
        key_pages, value_pages, source_pages, positions, page_heads, target_pages,
        source_pages.stride(0), key_pages.stride(0), key_pages.stride(1),
        D=head_dim, D_PADDED=triton.next_power_of_2(head_dim), N=page_tokens, num_warps=4,
    )  # fmt: skip
