"""The values that cross rooms. Letters: L layers, H KV heads, G query group, D head dim, T tokens.

``N`` is the block size in tokens, and ``nb`` the number of blocks before the boundary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_kvzip.rotary import RotaryTables


@dataclass(frozen=True)
class CacheGeometry:
    """Shape of the compressed layers on one worker."""

    num_layers: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int

    @property
    def pages_per_block(self) -> int:
        """Head pages in one block: one per layer and KV head."""
        return self.num_layers * self.num_kv_heads


@dataclass(frozen=True)
class PrefixPlan:
    """What follows from a prompt's length and the request's options; scheduler and workers agree.

    Attributes:
        boundary_tokens: tokens before it are compressed, tokens from it on stay dense; a multiple
            of the block size.
        num_prefix_blocks: blocks those tokens fill before compression.
        num_compressed_blocks: blocks that hold what is kept.
        ready_tokens: how many tokens must be computed before the prefix is compressed: the whole
            prompt, or the tokens before the boundary when the request declares its context.
        keep_ratio: asked for, by the request or by the server's settings.
        start_blocks: blocks of the prefix that an earlier compression covered; 0 for a raw prefix.
        held_blocks: blocks that hold what it kept of them.
        is_round: one compression among others while a long prompt is read, not the last.
    """

    boundary_tokens: int
    num_prefix_blocks: int
    num_compressed_blocks: int
    ready_tokens: int
    keep_ratio: float
    start_blocks: int = 0
    held_blocks: int = 0
    is_round: bool = False

    @property
    def num_freed_blocks(self) -> int:
        """Blocks that this compression gives back."""
        held = self.held_blocks + self.num_prefix_blocks - self.start_blocks
        return held - self.num_compressed_blocks

    @property
    def num_saved_blocks(self) -> int:
        """Blocks that the request does without from then on."""
        return self.num_prefix_blocks - self.num_compressed_blocks

    @property
    def share(self) -> float:
        """Kept / all KV pairs, as asked for or as the prefill budget allows."""
        fitting = self.num_compressed_blocks / self.num_prefix_blocks
        return fitting if self.is_round else min(self.keep_ratio, fitting)


@dataclass(frozen=True)
class LayerInputs:
    """What a scorer sees of one layer.

    Attributes:
        layer, num_layers: which layer of how many.
        keys: float32 ``[H, T, D]``, keys of the prefix after rotary embedding, T = boundary.
        values: float32 ``[H, T, D]``; None unless the scorer asks for them.
        observation_queries: float32 ``[W, H, G, D]``, queries of the last W context tokens after
            rotary embedding, the last of them at position ``num_context_tokens - 1``; None unless
            the scorer asks for them. W may be smaller than the setting when vLLM took the start of
            the window from its prefix cache.
        reconstruction: float32 ``[H, T]``, the most attention each pair got while the model
            repeated the prefix (:mod:`vllm_kvzip.reconstruction`); None unless the scorer asks.
        rotary: the model's rotary angles; None unless the scorer asks for them, or when the model
            has none.
        num_context_tokens: tokens a scorer may look at: the whole prompt, or T when the request
            declares a context that other questions shall reuse.
        scale: softmax scale.
        sink_tokens, recent_tokens: how many tokens at either end of the prefix are always kept.
        seed: equal for equal prefixes.
        first_position: position of the first key; not 0 when what lies before it was compressed
            earlier. T counts from there.
    """

    layer: int
    num_layers: int
    keys: torch.Tensor
    values: torch.Tensor | None
    observation_queries: torch.Tensor | None
    reconstruction: torch.Tensor | None
    rotary: RotaryTables | None
    num_context_tokens: int
    scale: float
    sink_tokens: int
    recent_tokens: int
    seed: int
    first_position: int = 0


@dataclass(frozen=True)
class KeepPlan:
    """Which KV pairs each head keeps, ragged; heads are ordered (layer, KV head).

    Attributes:
        positions: int64 ``[sum of pages * N]``, kept positions, ascending inside a head.
        offsets: int64 ``[L * H + 1]``; head ``i`` keeps ``positions[offsets[i]:offsets[i + 1]]``.
        pages: int64 ``[L, H]``, head pages each head keeps.
    """

    positions: torch.Tensor
    offsets: torch.Tensor
    pages: torch.Tensor


@dataclass(frozen=True)
class CompressedPrefix:
    """Where the kept KV pairs of one request lie.

    Attributes:
        page_ids: int64 ``[sum of pages]``, ordered (layer, KV head, position).
        pages: int64 ``[L, H]``, head pages of each head.
        scores: float32 ``[sum of pages * N]`` in the same order, of the kept pairs; None unless
            they will compete with later ones.
    """

    page_ids: torch.Tensor
    pages: torch.Tensor
    scores: torch.Tensor | None = None

    @cached_property
    def offsets(self) -> torch.Tensor:
        """Where the pages of each head begin, int32 ``[L * H + 1]``."""
        ends = self.pages.flatten().cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)

    @cached_property
    def padded(self) -> torch.Tensor:
        """Page ids as int32 ``[L, H, most pages of a head]``, zeros behind a head's last page."""
        width = int(self.pages.max())
        table = self.page_ids.new_zeros((*self.pages.shape, width), dtype=torch.int32)
        filled = torch.arange(width, device=self.pages.device) < self.pages[:, :, None]
        table[filled] = self.page_ids.to(torch.int32)
        return table
