"""Layers that keep every KV pair, in the same blocks as layers that are compressed."""

from __future__ import annotations

import torch

from vllm_kvzip.core import KeepPlan


def with_dense_layers(
    keep: KeepPlan, num_layers: int, num_pages: int, page_tokens: int
) -> KeepPlan:
    """A keep plan, and after its layers some that keep everything.

    Args:
        keep: of one tier of the layers that are compressed.
        num_layers: that keep everything, as it is.
        num_pages: of each of their heads, before compression and after it; 0 in a quantized tier.
        page_tokens: of each page.
    """
    if not num_layers:
        return keep
    num_heads = keep.pages.shape[1]
    pages = torch.cat([keep.pages, keep.pages.new_full((num_layers, num_heads), num_pages)])
    if not num_pages:
        return KeepPlan(keep.positions, pages)
    tokens = torch.arange(num_pages * page_tokens, device=keep.positions.device)
    positions = tokens.repeat(num_layers * num_heads).view(-1, page_tokens)
    return KeepPlan(torch.cat([keep.positions, positions]), pages)
