"""Which tokens of a prompt each head keeps, for whoever asks to see them.

A keep plan counts the tokens that competed. Where a prompt is compressed in rounds, these are what
earlier rounds kept, and then new ones; so positions in the prompt are followed from round to round.
Nothing else in a compression needs them: nobody records them unless a client has asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.core import KeepPlan

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass
class KeptPositions:
    """What each head keeps of one prompt, after the compressions that it has seen.

    Attributes:
        tiers: keep plans whose positions are those of the prompt; empty before the first one.
    """

    tiers: tuple[KeepPlan, ...] = ()

    def take(self, keeps: Sequence[KeepPlan], first: int, num_new_tokens: int) -> None:
        """A compression has chosen.

        Args:
            keeps: of each tier, with positions among what competed: pages of the tier before, each
                head padded to the most that one had; likewise for the tiers before it; new tokens.
            first: position of the first new token.
            num_new_tokens: of a head.
        """
        shape = keeps[0].pages.shape
        device = keeps[0].positions.device
        candidates = torch.arange(first, first + num_new_tokens, device=device).expand(*shape, -1)
        tiers = []
        for number, keep in enumerate(keeps):
            if number < len(self.tiers):
                candidates = torch.cat([_padded(self.tiers[number]), candidates], dim=2)
            rows = candidates.flatten(0, 1)[_heads(keep)[:, None], keep.positions.clamp(min=0)]
            positions = rows.masked_fill(keep.positions < 0, -1)
            tiers.append(KeepPlan(positions, keep.pages))
        self.tiers = tuple(tiers)

    def masks(self, num_tokens: int) -> list[torch.Tensor]:
        """What each head keeps in each tier, bool ``[L, H, num_tokens]``.

        Args:
            num_tokens: of the prompt that were compressed.
        """
        found = []
        for keep in self.tiers:
            # Places without a token go into a column that is cut off.
            columns = torch.where(keep.positions < 0, num_tokens, keep.positions)
            mask = columns.new_zeros((keep.pages.numel(), num_tokens + 1), dtype=torch.bool)
            mask[_heads(keep)[:, None], columns] = True
            found.append(mask[:, :num_tokens].reshape(*keep.pages.shape, num_tokens))
        return found


def packed(mask: torch.Tensor) -> bytes:
    """A mask as bits, row by row, each in whole bytes: token ``t`` is bit ``t % 8`` of a row's byte
    ``t // 8``, the lowest bit first.

    Args:
        mask: bool ``[L, H, T]``.

    Returns:
        ``L * H * ceil(T / 8)`` bytes.
    """
    rows = torch.nn.functional.pad(mask.flatten(0, 1), (0, -mask.shape[2] % 8))
    bits = torch.arange(8, device=mask.device)
    numbers = (rows.view(len(rows), -1, 8).to(torch.uint8) << bits.to(torch.uint8)).sum(dim=2)
    return numbers.to(torch.uint8).cpu().numpy().tobytes()


def _heads(keep: KeepPlan) -> torch.Tensor:
    """The head of each page of a plan, int64 ``[sum of pages]``."""
    heads = torch.arange(keep.pages.numel(), device=keep.positions.device)
    return heads.repeat_interleave(keep.pages.flatten(), output_size=len(keep.positions))


def _padded(keep: KeepPlan) -> torch.Tensor:
    """Positions of each head, int64 ``[L, H, most pages of a head * tokens of a page]``; -1 where a
    head has none."""
    width = int(keep.pages.max())
    filled = torch.arange(width, device=keep.pages.device) < keep.pages[..., None]
    table = keep.positions.new_full((*filled.shape, keep.positions.shape[1]), -1)
    table[filled] = keep.positions
    return table.flatten(2)
