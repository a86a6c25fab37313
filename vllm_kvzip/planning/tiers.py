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
    """Pages, or blocks, that some tokens of a head take, at least one."""
    return max(1, ceil(num_tokens / page_tokens))


@dataclass(frozen=True)
class TierBlocks:
    """Blocks of a compressed prefix: of KV pairs as they are, and of quantized ones.

    ``dense`` more are needed where other layers in the same blocks keep every KV pair.
    """

    full: int
    quantized: int
    dense: int = 0

    @property
    def total(self) -> int:
        """Blocks of the prefix."""
        return self.full + self.quantized + self.dense


@dataclass(frozen=True)
class TierRule:
    """How a keep ratio becomes blocks of two tiers.

    Attributes:
        mode: ``evict`` has the full tier only, ``quantize`` the quantized tier only, ``mixed``
            both.
        block_tokens: tokens of a block, which it holds of each head as they are.
        page_tokens: tokens of a quantized page.
        split: quantized pages that a block has for each head; together they hold more than
            ``block_tokens``.
        full_share: blocks that hold KV pairs as they are / all blocks, in mode ``mixed``.
        by_bytes: whether the keep ratio counts bytes; it counts KV pairs otherwise.
        shares: points (keep ratio, full share) with ascending ratios. Between two points the full
            share is linear; below the first and above the last it is theirs. Empty: ``full_share``
            at every ratio.
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
        """Tokens of each head that one block of quantized pages holds."""
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

        The blocks may have room for the whole prefix in quantized form. Counted by bytes, more of
        it is kept in full precision then, so that no block stays empty; counted by KV pairs, the
        prefix takes fewer blocks. One of the tiers has enough pages in every head for the protected
        tokens.

        Args:
            ratio: kept / all, in (0, 1].
            num_blocks: before compression.
            num_protected: sink and recent tokens, which every head keeps.
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
        """Choices for mode ``mixed``: first what the full share says, then more of one tier.

        Args:
            ratio, num_blocks: see :meth:`blocks`.
            least_full: ordinary blocks that hold every head's protected tokens.
            least: blocks of quantized pages that hold them.
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
        """``full`` full blocks, and quantized ones until a head keeps ``tokens`` tokens."""
        left = max(0.0, tokens - full * self.block_tokens - EPSILON)
        quantized = max(least, ceil(left / self.quantized_tokens))
        return TierBlocks(full, min(quantized, self._to_quantize(num_blocks, full)))

    def _by_bytes(self, total: int, num_blocks: int, full: int) -> TierBlocks:
        """``full`` of ``total`` blocks are full ones; more of them if quantized ones stay empty."""
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
        """Quantized blocks that hold all tokens for which ``full`` full blocks have no room."""
        return ceil((num_blocks - full) * self.block_tokens / self.quantized_tokens)
