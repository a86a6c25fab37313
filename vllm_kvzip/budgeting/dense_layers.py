"""Layers that keep every KV pair, in the same blocks as layers that are compressed."""

from __future__ import annotations

import torch

from vllm_kvzip.core import KeepPlan


def with_dense_layers(
    keep: KeepPlan, num_layers: int, num_pages: int, page_tokens: int
) -> KeepPlan:
    """A keep plan, and after its layers some that keep everything.

    Args:
        keep: of the layers that are compressed, KV pairs as they are.
        num_layers: that keep everything.
        num_pages: of each of their heads, before compression and after it.
        page_tokens: of each page.
    """
    if not num_layers:
        return keep
    num_heads = keep.pages.shape[1]
    pages = keep.pages.new_full((num_layers, num_heads), num_pages)
    tokens = torch.arange(num_pages * page_tokens, device=keep.positions.device)
    positions = tokens.repeat(num_layers * num_heads).view(-1, page_tokens)
    return KeepPlan(torch.cat([keep.positions, positions]), torch.cat([keep.pages, pages]))
