"""The values that cross rooms. Letters: L layers, H KV heads, G query group, D head dim, T tokens.

``N`` is the size of a head page in tokens. A block holds one page of every KV head of every layer,
or more than one where vLLM makes blocks so large that they hold the state of another layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm_kvzip.model.key_transform import KeyTransform


@dataclass(frozen=True)
class CacheGeometry:
    """Shape of the compressed layers on one worker.

    Attributes:
        num_layers, num_kv_heads, group_size, head_dim: L, H, G, D.
        block_size: tokens per block.
        pages_per_head: head pages of one KV head of one layer in a block.
    """

    num_layers: int
    num_kv_heads: int
    group_size: int
    head_dim: int
    block_size: int
    pages_per_head: int = 1

    @property
    def page_tokens(self) -> int:
        """N, tokens of a head page."""
        return self.block_size // self.pages_per_head

    @property
    def num_heads(self) -> int:
        """KV heads of all layers, L * H."""
        return self.num_layers * self.num_kv_heads

    @property
    def pages_per_block(self) -> int:
        """Head pages in one block."""
        return self.num_heads * self.pages_per_head


@dataclass(frozen=True)
class Tier:
    """Blocks of a compressed prefix whose pages hold KV pairs of one precision.

    Attributes:
        quantized: whether they are quantized, or as they are.
        num_blocks: how many.
        page_tokens: tokens of a page.
        split: pages of a head page; 1 for KV pairs as they are.
        pages_per_head: head pages of a head in one block.
    """

    quantized: bool
    num_blocks: int
    page_tokens: int
    split: int = 1
    pages_per_head: int = 1

    @property
    def num_pages(self) -> int:
        """Pages of a head, on average."""
        return self.num_blocks * self.pages_per_head * self.split


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
        held_blocks: blocks that hold what the earlier compression kept.
        is_round: it makes room while a long prompt is read, or a long answer generated; it is not
            the one that compresses the whole prompt.
        num_quantized_blocks: of the compressed blocks the last ones, which hold quantized pages.
        quantized_page_tokens: tokens of such a page.
        quantized_split: quantized pages of a head page.
        num_sink_tokens: first tokens before the boundary, which every head keeps.
        num_recent_tokens: last tokens before the boundary, which every head keeps; fewer than the
            setting where the sink tokens leave no room for more.
        min_pages_per_head: ordinary head pages that a head needs for both, at least one.
        pages_per_head: head pages of a head in one block.
        num_dense_blocks: of the compressed blocks those that are needed because other layers have a
            part of each block and keep every KV pair.
        num_candidate_tokens: tokens of a head, on average, of which it keeps some, where an earlier
            compression has dropped others and there are two tiers; 0: all before the boundary.
        quality_loss: nats a token that compressing may cost at most; as many of the compressed
            blocks as that needs are used, known once the pairs have been scored. None: all are.
        estimated_loss: nats a token, set when that is known.
    """

    boundary_tokens: int
    num_prefix_blocks: int
    num_compressed_blocks: int
    ready_tokens: int
    keep_ratio: float
    start_blocks: int = 0
    held_blocks: int = 0
    is_round: bool = False
    num_quantized_blocks: int = 0
    quantized_page_tokens: int = 0
    quantized_split: int = 1
    num_sink_tokens: int = 0
    num_recent_tokens: int = 0
    min_pages_per_head: int = 1
    pages_per_head: int = 1
    num_dense_blocks: int = 0
    num_candidate_tokens: int = 0
    quality_loss: float | None = None
    estimated_loss: float | None = None

    @property
    def terms(self) -> tuple[float, float | None]:
        """What was asked for: keep ratio and quality loss. Prefixes are shared by equal terms."""
        return self.keep_ratio, self.quality_loss

    def fitted(self, num_blocks: int, estimated_loss: float) -> PrefixPlan:
        """The plan once it is known how many of its blocks are needed."""
        return replace(self, num_compressed_blocks=num_blocks, estimated_loss=estimated_loss)

    @property
    def num_observed_tokens(self) -> int:
        """Where the observation window ends: the boundary of a round, else ``ready_tokens``."""
        return self.boundary_tokens if self.is_round else self.ready_tokens

    @property
    def num_protected_tokens(self) -> int:
        """Tokens that every head keeps: sink and recent ones."""
        return self.num_sink_tokens + self.num_recent_tokens

    @property
    def num_full_blocks(self) -> int:
        """Compressed blocks that hold KV pairs as they are, of layers that are compressed."""
        held = self.num_compressed_blocks - self.num_dense_blocks
        return held - self.num_quantized_blocks

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """From the most precise one on; the first one, of KV pairs as they are, may be empty."""
        in_block = self.pages_per_head
        page_tokens = self.boundary_tokens // (self.num_prefix_blocks * in_block)
        full = Tier(False, self.num_full_blocks, page_tokens, pages_per_head=in_block)
        if not self.num_quantized_blocks:
            return (full,)
        page_tokens, split = self.quantized_page_tokens, self.quantized_split
        return full, Tier(True, self.num_quantized_blocks, page_tokens, split, in_block)

    @property
    def num_quantized_pages(self) -> int:
        """Quantized pages of a head, on average."""
        return self.num_quantized_blocks * self.pages_per_head * self.quantized_split

    @property
    def quantized_tokens(self) -> int:
        """Tokens a head keeps quantized, on average.

        A head that keeps everything may fill its last page in part, so it can be fewer. In a later
        compression other heads do not use a last page that they cannot fill, and it is a bound.
        """
        left = (self.num_candidate_tokens or self.boundary_tokens) - self.full_tokens
        return min(self.num_quantized_pages * self.quantized_page_tokens, left)

    @property
    def full_tokens(self) -> int:
        """Tokens a head keeps as they are, on average."""
        return self.num_full_blocks * self.boundary_tokens // self.num_prefix_blocks

    @property
    def kept_tokens(self) -> int:
        """Tokens a head keeps in either tier, on average."""
        return self.full_tokens + self.quantized_tokens

    @property
    def num_source_blocks(self) -> int:
        """Blocks that this compression reads: what an earlier one kept, and raw ones."""
        return self.held_blocks + self.num_prefix_blocks - self.start_blocks

    @property
    def num_freed_blocks(self) -> int:
        """Blocks that this compression gives back."""
        return self.num_source_blocks - self.num_compressed_blocks

    @property
    def num_saved_blocks(self) -> int:
        """Blocks that the request does without from then on."""
        return self.num_prefix_blocks - self.num_compressed_blocks

    def num_blocks_to_reserve(self, num_tokens: int) -> int:
        """Blocks to reserve in a step after which ``num_tokens`` of the request are computed."""
        return 0 if num_tokens < self.ready_tokens else self.num_compressed_blocks

    def as_told(self) -> dict[str, Any]:
        """What a client is told of a compressed prefix, as plain values.

        Returns:
            ``compressed_tokens``, ``blocks_before``, ``blocks_held``, their ratio ``keep_ratio``
            and, where a quality loss was asked for, ``estimated_loss`` in nats a token.
        """
        told = {
            "compressed_tokens": self.boundary_tokens,
            "blocks_before": self.num_prefix_blocks,
            "blocks_held": self.num_compressed_blocks,
            "keep_ratio": self.num_compressed_blocks / self.num_prefix_blocks,
        }
        if self.estimated_loss is not None:
            told["estimated_loss"] = self.estimated_loss
        return told

    @property
    def share(self) -> float:
        """Kept / all KV pairs of either tier, as asked for or as the prefill budget allows."""
        if self.num_quantized_blocks:
            return self.kept_tokens / self.boundary_tokens
        full = self.num_full_blocks / self.num_prefix_blocks
        return full if self.is_round else min(self.keep_ratio, full)

    @property
    def full_share(self) -> float:
        """KV pairs that are kept as they are / all."""
        if not self.num_quantized_blocks:
            return self.share
        return self.num_full_blocks / self.num_prefix_blocks


@dataclass(frozen=True)
class KeepPlan:
    """Which KV pairs each head keeps in one tier; heads are ordered (layer, KV head).

    Attributes:
        positions: int64 ``[sum of pages, page tokens]``, the tokens of each page, ascending inside
            a head; -1 in place of tokens that a head does not have, at the end of its last pages.
        pages: int64 ``[L, H]``, pages of each head.
    """

    positions: torch.Tensor
    pages: torch.Tensor


@dataclass(frozen=True)
class EarlierPages:
    """Quantized pages that an earlier compression filled, some of whose tokens are kept.

    Attributes:
        ids: int64 ``[L, H, w]``; a head that has fewer is padded with any page.
        by_layer: how many quantized pages each layer has from now on.
    """

    ids: torch.Tensor
    by_layer: tuple[int, ...]


@dataclass(frozen=True)
class StoredTier:
    """The pages of one tier of a compressed prefix.

    Attributes:
        page_ids: int64 ``[sum of pages]``, ordered (layer, KV head, position).
        pages: int64 ``[L, H]``, pages of each head.
        split: pages of a head page.
    """

    page_ids: torch.Tensor
    pages: torch.Tensor
    split: int = 1

    @cached_property
    def starts(self) -> torch.Tensor:
        """Where the pages of each head begin in ``page_ids``, int32 ``[L * H + 1]``."""
        ends = self.pages.flatten().cumsum(0)
        return torch.cat([ends.new_zeros(1), ends]).to(torch.int32)


@dataclass(frozen=True)
class CompressedPrefix:
    """Where the kept KV pairs of one request lie.

    Attributes:
        tiers: from the most precise one on. The first one has KV pairs as they are, maybe of no
            head; all its pages are full. Those of the others are too, but where a head keeps
            everything.
        scores: float32 ``[sum of pages * N]`` of the pairs of the first tier, in the order of its
            pages; None unless they will compete with later ones. In a cache with two tiers those of
            sink tokens are plus infinity.
        positions: int32, likewise, where these pairs are in the request; None unless they will be
            scored anew with later ones.
        key_transform: ``[L, H, D]``, of quantized keys; None where there are none.
        sound: bool, a tensor of one element on a device that nobody waits for: whether all keys,
            values and scores that were looked at are finite. Where they are not, what is kept has
            no meaning. None where that has been looked at.
        fitted: the plan with as many blocks as it needs, where a quality loss decided; else None.
        quantized_scores: float32 ``[sum of pages * Q]``, scores of the quantized tier; minus
            infinity where a page holds no token.
    """

    tiers: tuple[StoredTier, ...]
    scores: torch.Tensor | None = None
    key_transform: KeyTransform | None = None
    sound: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    fitted: PrefixPlan | None = None
    quantized_scores: torch.Tensor | None = None

    @property
    def page_ids(self) -> torch.Tensor:
        """Of KV pairs as they are; see :class:`StoredTier`."""
        return self.tiers[0].page_ids

    @property
    def pages(self) -> torch.Tensor:
        """Of KV pairs as they are; see :class:`StoredTier`."""
        return self.tiers[0].pages

    @property
    def offsets(self) -> torch.Tensor:
        """Of the first tier; see :meth:`offsets_of`."""
        return self.tiers[0].starts

    @property
    def quantized(self) -> StoredTier | None:
        """The quantized tier; None where there is none."""
        return self.tiers[1] if len(self.tiers) > 1 else None

    def offsets_of(self, tier: int) -> torch.Tensor:
        """Where the pages of each head begin in the whole prefix, int32 ``[L * H + 1]``.

        Head pages of a tier follow those of the tiers before it. Counted in pages of the tier,
        of which ``split`` share a head page.

        Args:
            tier: its number. One that the prefix does not have has no page.
        """
        before = self.tiers[:tier]
        num_head_pages = sum(each.starts[-1:] // each.split for each in before)
        if tier >= len(self.tiers):
            return torch.zeros_like(self.offsets) + num_head_pages
        return num_head_pages * self.tiers[tier].split + self.tiers[tier].starts

    @cached_property
    def padded(self) -> torch.Tensor:
        """Page ids of the first tier, int32 ``[L, H, most pages of a head]``, padded with zeros."""
        width = int(self.pages.max())
        table = self.page_ids.new_zeros((*self.pages.shape, width), dtype=torch.int32)
        filled = torch.arange(width, device=self.pages.device) < self.pages[:, :, None]
        table[filled] = self.page_ids.to(torch.int32)
        return table
