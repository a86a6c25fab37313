"""Where rounds come, in blocks: positions alone decide, so that equal prefixes are cut alike."""

from __future__ import annotations


def round_blocks(budget: int) -> int:
    """New blocks between two rounds, for a budget in blocks."""
    return max(1, budget // 2)


def next_round(budget: int, start_blocks: int, held_blocks: int) -> int:
    """Blocks before the next position where more than a budget is held.

    Args:
        budget: in blocks.
        start_blocks: blocks that have been compressed already.
        held_blocks: blocks that hold what was kept of them.
    """
    step = round_blocks(budget)
    # The first position at which more than the budget is held, rounded up to budget + k * step.
    full = start_blocks + budget - held_blocks
    return budget + max(1, (full - budget) // step + 1) * step
