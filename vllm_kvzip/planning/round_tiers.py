"""How many blocks of either tier a later compression has: known from lengths alone.

A budget of P tokens is the bytes of P ordinary KV pairs of each head. While all that competes fits
into these bytes in one tier or the other, as much of it as possible stays as it is. Then only the
full share does, the rest is quantized, and what does not fit is dropped. So pairs are quantized
before they are dropped, and the pairs that stay as they are become fewer from round to round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, floor
from typing import TYPE_CHECKING

from vllm_kvzip.planning.tiers import TierBlocks, pages_for

if TYPE_CHECKING:
    from vllm_kvzip.config import Mode
    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.tiers import TierRule


@dataclass(frozen=True)
class Candidates:
    """What competes in a compression, of each head on average.

    Attributes:
        num_prefix_blocks: blocks that all tokens before the boundary would fill.
        full_blocks: blocks that the KV pairs fill that are not quantized yet.
        num_tokens: of all KV pairs.
    """

    num_prefix_blocks: int
    full_blocks: int
    num_tokens: int

    @classmethod
    def after(
        cls, done: PrefixPlan | None, num_prefix_blocks: int, block_tokens: int
    ) -> Candidates:
        """What is left of an earlier compression, and all that came since.

        Args:
            done: the earlier one; None: there was none.
            num_prefix_blocks: where the later one ends.
            block_tokens: tokens of a block.
        """
        full = kept = start = 0
        if done is not None:
            full, kept, start = done.num_full_blocks, done.kept_tokens, done.num_prefix_blocks
        new = num_prefix_blocks - start
        return cls(num_prefix_blocks, full + new, kept + new * block_tokens)


def least_budget(num_protected: int, block_tokens: int, mode: Mode) -> int:
    """The fewest blocks that a budget in tokens may have.

    In mode ``mixed`` each tier has room for the protected tokens: a head may have quantized its
    sink tokens with a prompt, and keeps its recent tokens as they are.

    Args:
        num_protected: sink and recent tokens.
        block_tokens: tokens of a block.
        mode: of compression.
    """
    return max(2, pages_for(num_protected, block_tokens) * (2 if mode == "mixed" else 1))


def following(plan: PrefixPlan, done: PrefixPlan) -> PrefixPlan:
    """The same compression, where what an earlier one kept competes with what is new."""
    return replace(
        plan, start_blocks=done.num_prefix_blocks, held_blocks=done.num_compressed_blocks
    )


def with_blocks(
    plan: PrefixPlan, blocks: TierBlocks, tiers: TierRule | None, pages_per_head: int
) -> PrefixPlan:
    """A plan with so many blocks of each tier.

    Args:
        plan: of a compression.
        blocks: that it has.
        tiers: how quantized pages are cut; None: there are none.
        pages_per_head: head pages of a head in one block.
    """
    plan = replace(
        plan,
        num_compressed_blocks=blocks.total,
        num_dense_blocks=blocks.dense,
        num_quantized_blocks=blocks.quantized,
    )
    if tiers is None or not blocks.quantized:
        return plan
    return replace(
        plan,
        quantized_page_tokens=tiers.page_tokens,
        quantized_split=tiers.split // pages_per_head,
    )


def blocks_of_later(
    tiers: TierRule, plan: PrefixPlan, budget: int, done: PrefixPlan | None
) -> tuple[TierBlocks, int]:
    """Blocks of a round, or of a prompt's last compression after rounds.

    Args:
        tiers: how a keep ratio becomes blocks.
        plan: the compression; of a prompt, what it would be without rounds before.
        budget: in blocks.
        done: the compression before; None: there was none.

    Returns:
        Blocks of each tier, and the tokens of a head that compete, on average.
    """
    block_tokens = plan.boundary_tokens // plan.num_prefix_blocks
    candidates = Candidates.after(done, plan.num_prefix_blocks, block_tokens)
    about = tiers, budget, candidates, plan.num_protected_tokens
    if plan.is_round:
        return round_blocks(*about), candidates.num_tokens
    wanted = TierBlocks(plan.num_full_blocks, plan.num_quantized_blocks)
    return last_blocks(wanted, *about), candidates.num_tokens


def blocks_within(
    budget: int, num_prefix_blocks: int, tiers: TierRule, num_protected: int
) -> TierBlocks:
    """Blocks of a prompt that is compressed at once, where the keep ratio wants more than a budget.

    Args:
        budget: in blocks.
        num_prefix_blocks: of the prompt.
        tiers, num_protected: see :func:`round_blocks`.
    """
    candidates = Candidates.after(None, num_prefix_blocks, tiers.block_tokens)
    return round_blocks(tiers, budget, candidates, num_protected)


def round_blocks(
    tiers: TierRule, budget: int, candidates: Candidates, num_protected: int
) -> TierBlocks:
    """Blocks of a round, at most as many as the budget has.

    In mode ``mixed`` the full tier has room for the protected tokens of every head.

    Args:
        tiers: how a keep ratio becomes blocks.
        budget: in blocks.
        candidates: what competes.
        num_protected: sink and recent tokens.
    """
    if tiers.mode == "evict":
        return TierBlocks(budget, 0)
    if tiers.mode == "quantize":
        least = pages_for(num_protected, tiers.quantized_tokens)
        return TierBlocks(0, min(budget, max(least, _to_quantize(tiers, candidates, 0))))
    most = budget - pages_for(num_protected, tiers.quantized_tokens)
    least = min(_least_full(tiers, budget, candidates, num_protected), most)
    room = budget * tiers.quantized_tokens - candidates.num_tokens
    everything = floor(room / (tiers.quantized_tokens - tiers.block_tokens))
    full = min(max(least, everything), candidates.full_blocks, budget)
    while full > least and full + _to_quantize(tiers, candidates, full) > budget:
        full -= 1
    return TierBlocks(full, min(budget - full, _to_quantize(tiers, candidates, full)))


def last_blocks(
    wanted: TierBlocks, tiers: TierRule, budget: int, candidates: Candidates, num_protected: int
) -> TierBlocks:
    """Blocks of a prompt's last compression, after rounds.

    Args:
        wanted: what the keep ratio says.
        tiers, budget, candidates, num_protected: see :func:`round_blocks`.
    """
    if wanted.total > budget or tiers.mode == "evict":
        return round_blocks(tiers, budget, candidates, num_protected)
    full, least = 0, pages_for(num_protected, tiers.quantized_tokens)
    if tiers.mode == "mixed":
        full = max(wanted.full, pages_for(num_protected, tiers.block_tokens))
        full = min(full, candidates.full_blocks, budget - least)
    most = min(budget - full, _to_quantize(tiers, candidates, full))
    return TierBlocks(full, min(max(wanted.quantized, least), most))


def scored_ratio(tiers: TierRule, keep_ratio: float) -> float:
    """Kept / all KV pairs of either tier that a keep ratio stands for, whatever the length.

    Scorers look at it, and the scores of several rounds are compared.

    Args:
        tiers: how it becomes blocks.
        keep_ratio: of KV pairs, or of bytes where ``tiers`` says so.
    """
    if not tiers.by_bytes:
        return keep_ratio
    full = tiers.full_share_at(keep_ratio) if tiers.mode == "mixed" else 0.0
    return min(1.0, keep_ratio * (full + (1 - full) * tiers.quantized_tokens / tiers.block_tokens))


def _least_full(tiers: TierRule, budget: int, candidates: Candidates, num_protected: int) -> int:
    """Blocks of the full tier when not everything fits."""
    num_tokens = candidates.num_prefix_blocks * tiers.block_tokens
    held = budget / candidates.num_prefix_blocks
    if not tiers.by_bytes:
        mean = tiers.full_share * tiers.block_tokens
        mean += (1 - tiers.full_share) * tiers.quantized_tokens
        held = min(candidates.num_tokens, budget * mean) / num_tokens
    wanted = round(tiers.full_share_at(min(1.0, held)) * budget)
    least = max(wanted, pages_for(num_protected, tiers.block_tokens))
    return min(least, candidates.full_blocks)


def _to_quantize(tiers: TierRule, candidates: Candidates, full: int) -> int:
    """Blocks of quantized pages for all that competes beside ``full`` blocks as it is."""
    left = candidates.num_tokens - full * tiers.block_tokens
    return max(0, ceil(left / tiers.quantized_tokens))
