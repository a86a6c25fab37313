"""How the work of attention is cut: tiles of query rows and tokens, and runs of tokens."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from .launching import INTERPRETED

LEAST_RUN = 256
"""Tokens of the shortest run."""
MOST_RUNS = 32
"""Of a pair; on an H200 64 took a quarter longer than 33 (one request, 32,768 tokens, 8 pairs)."""


@dataclass(frozen=True)
class Tile:
    """What a program holds at once.

    Attributes:
        rows: (token, query head of the group) rows.
        tokens: of full-precision pages.
        quantized_tokens: of quantized pages.
        num_warps: that share the work.
    """

    rows: int
    tokens: int
    quantized_tokens: int
    num_warps: int


def choose_tile(
    head_dim: int,
    dtype: torch.dtype,
    num_rows: int,
    *,
    two_tiers: bool = False,
    eight_bits: bool = False,
    large_blocks: bool = False,
) -> Tile:
    """A tile for which registers do not spill and 99 KiB of shared memory suffice.

    That is what a block can have on the smallest cards. float32, which has no tensor cores, keeps
    its products in registers. So does the decoding of quantized pages with its tiles, which are
    therefore smaller; and with few bytes in each, several blocks on a multiprocessor keep its
    memory busy.

    Args:
        head_dim: D.
        dtype: in which is computed.
        num_rows: (token, query head of the group) rows of the longest query.
        two_tiers: there are quantized pages.
        eight_bits: pages hold 8-bit numbers, which are turned into ``dtype`` in registers.
        large_blocks: a head has several pages in a block, and finding them takes registers, too.
    """
    wide = head_dim > 128
    if dtype is torch.float32 and not INTERPRETED:
        return Tile(16, 32 if head_dim <= 64 else 16, 16, 4)
    rows = min(64, max(16, triton.next_power_of_2(num_rows)))
    tokens = 64 if wide else 128
    if rows > 32 or (rows > 16 and wide):
        tokens //= 2
    if eight_bits and rows > 16:
        tokens = min(tokens, 64)
    num_warps = 4 if rows <= 32 else 8
    if two_tiers:
        tokens = min(tokens, 32 if wide else 64)
        if wide and rows > 16:
            rows, num_warps = 32, 8
        if large_blocks and head_dim > 64:
            num_warps = 8
    return Tile(rows, tokens, 32, num_warps)


def choose_num_runs(num_programs: int, most_tokens: int, num_processors: int, least: int) -> int:
    """How many runs a pair is cut in at most: enough to keep the card busy, also when heads differ.

    Sixteen programs a multiprocessor if every pair has that many: pairs differ in length, and with
    two programs a multiprocessor in place of sixteen a step takes up to 1.4 times as long (8
    requests of 131,072 tokens on an H200). Four runs at least where one tile holds all queries, so
    that a head that kept much does not hold up the others. A kernel inside a CUDA graph cannot ask
    how long this step's pairs are, so it is told this number and cuts each pair by its own length.

    Args:
        num_programs: tiles of query rows of all pairs.
        most_tokens: no pair has more.
        num_processors: multiprocessors of the card.
        least: tokens of the shortest run; a shorter one costs more in the joining than it saves.

    Returns:
        1 to 32.
    """
    wanted = -(-16 * num_processors // num_programs)
    return max(1, min(MOST_RUNS, max(4, wanted), -(-most_tokens // least)))


@functools.lru_cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a card; 1 on the CPU."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
