"""What competes in a round whose scorer sees everything anew: what is kept, then what is new.

Heads kept different numbers of pages, so a head's kept pages are padded at the end. Order within a
head stays that of positions. Nothing here waits for a device, but for the width of the padded
table, which is counted once for each prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_kvzip.core import CompressedPrefix, KeepPlan


@dataclass(frozen=True)
class Candidates:
    """KV pairs of which a round chooses, ``[kept ..., pad ..., new ...]`` of each head.

    Attributes:
        pages: int64 ``[L, H, w + n]``, where they lie; w is the most pages a head kept.
        positions: int32 ``[L, H, T]``, in the request; T = ``(w + n) * N``. Those of pads are some
            pair's.
        real: bool ``[L, H, T]``, which of them are no pads; None: all.
        available: int64 ``[L, H]``, pages of each head that are no pads; None: all.
    """

    pages: torch.Tensor
    positions: torch.Tensor
    real: torch.Tensor | None
    available: torch.Tensor | None

    @classmethod
    def of_round(
        cls,
        earlier: CompressedPrefix | None,
        sources: torch.Tensor,
        first_position: int,
        page_tokens: int,
    ) -> Candidates:
        """What an earlier compression kept, and new pages.

        Args:
            earlier: with the positions of what it kept; None: there is nothing but the new pages.
            sources: int64 ``[L, H, n]``, pages of the new blocks.
            first_position: of their first token.
            page_tokens: N.
        """
        num_new = sources.shape[2] * page_tokens
        places = torch.arange(first_position, first_position + num_new, device=sources.device)
        new = places.to(torch.int32).expand(*sources.shape[:2], num_new)
        if earlier is None:
            return cls(sources, new, None, None)
        assert earlier.positions is not None
        kept = earlier.padded.to(torch.int64)
        slots = torch.arange(kept.shape[2], device=sources.device)
        starts = earlier.offsets[:-1].view(earlier.pages.shape).to(torch.int64)
        index = (starts[..., None] + slots).clamp_(max=len(earlier.page_ids) - 1)
        old = earlier.positions.view(-1, page_tokens)[index].flatten(2)
        filled = (slots < earlier.pages[..., None]).repeat_interleave(page_tokens, dim=2)
        return cls(
            torch.cat([kept, sources], dim=2),
            torch.cat([old, new], dim=2),
            torch.cat([filled, torch.ones_like(new, dtype=torch.bool)], dim=2),
            earlier.pages + sources.shape[2],
        )


def of_kept(of_candidates: torch.Tensor, keep: KeepPlan) -> torch.Tensor:
    """What is said of candidates, of those that are kept, in the order of the plan.

    Its pages are full.

    Args:
        of_candidates: ``[L, H, T]``, scores or positions.
        keep: of the first tier.

    Returns:
        ``[sum of pages * N]``.
    """
    heads = torch.arange(keep.pages.numel(), device=of_candidates.device)
    heads = heads.repeat_interleave(keep.pages.flatten(), output_size=len(keep.positions))
    return of_candidates.flatten(0, 1)[heads[:, None], keep.positions].flatten()
