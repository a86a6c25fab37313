"""How many blocks of a compressed prefix hold KV pairs as they are, and how many quantized ones.

Both follow from the prompt's length, like the number of blocks itself, so that scheduler and
workers agree on them before any score is known. Scores then move pages of either tier between
heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import ceil, floor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvzip.config import Mode

EPSILON = 1e-9  # 0.3 * 10 is 3.0000000000000004 in floating point, and must stay 3 blocks


def pages_for(num_tokens: int, page_tokens: int) -> int:
    """Head pages that some tokens of a head take, at least one."""
    return max(1, ceil(num_tokens / page_tokens))


@dataclass(frozen=True)
class TierBlocks:
    """Blocks of a compressed prefix: of KV pairs as they are, and of quantized ones."""

    full: int
    quantized: int

    @property
    def total(self) -> int:
        """Blocks of the prefix."""
        return self.full + self.quantized


@dataclass(frozen=True)
class TierRule:
    """How a keep ratio becomes blocks of two tiers.

    Attributes:
        mode: ``quantize`` knows no full tier, ``mixed`` has both, ``evict`` no quantized one.
        block_tokens: N, tokens of an ordinary head page.
        page_tokens: Q, tokens of a quantized page.
        split: S, quantized pages of a head page; together they hold more than N.
        full_share: of the blocks, how many hold KV pairs as they are; mode ``mixed``.
        by_bytes: whether the keep ratio counts bytes; it counts KV pairs otherwise.
        shares: keep ratio and its own full share, ascending; linear between them, and the first
            and the last hold beyond. Empty: ``full_share`` everywhere.
    """

    mode: Mode
    block_tokens: int
    page_tokens: int = 0
    split: int = field(default=1, kw_only=True)
    full_share: float = 0.0
    by_bytes: bool = False
    shares: tuple[tuple[float, float], ...] = ()

    @property
    def quantized_tokens(self) -> int:
        """Tokens that the quantized pages of one head page hold."""
        return self.split * self.page_tokens

    def full_share_at(self, ratio: float) -> float:
        """Share of the blocks that hold KV pairs as they are, at a keep ratio."""
        if not self.shares:
            return self.full_share
        below = [point for point in self.shares if point[0] <= ratio] or [self.shares[0]]
        above = [point for point in self.shares if point[0] >= ratio] or [self.shares[-1]]
        (low, first), (high, last) = below[-1], above[0]
        return first if high <= low else first + (last - first) * (ratio - low) / (high - low)

    def blocks(self, ratio: float, num_blocks: int, num_protected: int) -> TierBlocks:
        """Blocks of the compressed form of ``num_blocks`` blocks, at most as many.

        What is counted by bytes and fits quantized as a whole has more in full precision instead
        of leaving blocks empty; what is counted by KV pairs takes fewer blocks then. Either tier
        can hold the tokens that every head keeps: there is a page for them in the quantized one
        for every head, or in the other.

        Args:
            ratio: kept / all, in (0, 1].
            num_blocks: before compression.
            num_protected: tokens that every head keeps.
        """
        if self.mode == "evict":
            wanted = ceil(ratio * num_blocks - EPSILON)
            least = pages_for(num_protected, self.block_tokens)
            return TierBlocks(min(num_blocks, max(wanted, least)), 0)
        num_tokens = num_blocks * self.block_tokens
        num_protected = min(num_protected, num_tokens)
        least = pages_for(num_protected, self.quantized_tokens)
        everything = TierBlocks(0, self._to_quantize(num_blocks, 0))
        if self.mode == "quantize":
            wanted = ceil((ratio * num_tokens - EPSILON) / self.quantized_tokens)
            if self.by_bytes:
                wanted = ceil(ratio * num_blocks - EPSILON)
            return TierBlocks(0, min(max(least, wanted), everything.quantized))
        least_full = pages_for(num_protected, self.block_tokens)
        found = self._mixed(ratio, num_blocks, least_full, least)
        fit = [b for b in found if b.full >= least_full or b.quantized >= least]
        if found[0] in fit:
            return found[0]
        return min(fit, key=lambda blocks: blocks.total, default=everything)

    def _mixed(
        self, ratio: float, num_blocks: int, least_full: int, least: int
    ) -> list[TierBlocks]:
        """What the full share says, and next to it what has more of one tier.

        Args:
            ratio, num_blocks: see :meth:`blocks`.
            least_full, least: pages for a head's protected tokens, in either tier.
        """
        share = self.full_share_at(ratio)
        if self.by_bytes:
            total = min(num_blocks, max(least, ceil(ratio * num_blocks - EPSILON)))
            shares = (round(share * total), total - least, least_full)
            return [self._by_bytes(total, num_blocks, full) for full in shares if full <= total]
        tokens = ratio * num_blocks * self.block_tokens
        mean = share * self.block_tokens + (1 - share) * self.quantized_tokens
        wanted = min(num_blocks, round(share * tokens / mean))
        return [
            self._by_tokens(tokens, num_blocks, full, more)
            for full, more in ((wanted, 0), (wanted, least), (least_full, 0))
        ]

    def _by_tokens(self, tokens: float, num_blocks: int, full: int, least: int) -> TierBlocks:
        """So many full blocks, and quantized ones until that many tokens a head are kept."""
        left = max(0.0, tokens - full * self.block_tokens - EPSILON)
        quantized = max(least, ceil(left / self.quantized_tokens))
        return TierBlocks(full, min(quantized, self._to_quantize(num_blocks, full)))

    def _by_bytes(self, total: int, num_blocks: int, full: int) -> TierBlocks:
        """So many full blocks of a total; more of them when the rest would stay empty."""
        if total - full < self._to_quantize(num_blocks, full):
            return TierBlocks(full, total - full)
        num_tokens, spread = (
            num_blocks * self.block_tokens,
            self.quantized_tokens - self.block_tokens,
        )
        full = max(full, floor((total * self.quantized_tokens - num_tokens) / spread))
        while full + self._to_quantize(num_blocks, full) > total:
            full -= 1
        return TierBlocks(full, self._to_quantize(num_blocks, full))

    def _to_quantize(self, num_blocks: int, full: int) -> int:
        """Blocks for everything that ``full`` blocks leave over."""
        return ceil((num_blocks - full) * self.block_tokens / self.quantized_tokens)
