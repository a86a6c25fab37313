"""What competes in a later compression of a request: what was kept before, then what is new.

Either with the scores that kept pairs got when they were new, or scored anew with everything else.
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
    """KV pairs that are scored anew in a round, ``[kept ..., pad ..., new ...]`` of each head.

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

    Args:
        of_candidates: ``[L, H, T]``, scores or positions.
        keep: of a tier; positions are asked of full pages only.

    Returns:
        ``[sum of pages * tokens of a page]``; scores are minus infinity where there is no token.
    """
    heads = torch.arange(keep.pages.numel(), device=of_candidates.device)
    heads = heads.repeat_interleave(keep.pages.flatten(), output_size=len(keep.positions))
    found = of_candidates.flatten(0, 1)[heads[:, None], keep.positions.clamp(min=0)]
    if found.is_floating_point():
        found.masked_fill_(keep.positions < 0, float("-inf"))
    return found.flatten()


def with_earlier(
    earlier: CompressedPrefix, sources: torch.Tensor, scores: torch.Tensor, page_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of a later compression: what was kept before, then what is new.

    A pad has a score of minus infinity and is never chosen.

    Args:
        earlier: what was kept, with its scores.
        sources: int64 ``[L, H, n]``, pages of the new blocks.
        scores: float32 ``[L, H, n * N]``.
        page_tokens: N.

    Returns:
        pages ``[L, H, w + n]`` and scores ``[L, H, (w + n) * N]``, w being the most pages a head
        kept.
    """
    assert earlier.scores is not None
    old_pages = earlier.padded.to(torch.int64)
    width = old_pages.shape[2]
    device = scores.device
    filled = torch.arange(width, device=device) < earlier.pages[:, :, None]
    old_scores = torch.full((*old_pages.shape, page_tokens), float("-inf"), device=device)
    old_scores[filled] = earlier.scores.view(-1, page_tokens)
    return (
        torch.cat([old_pages, sources], dim=2),
        torch.cat([old_scores.flatten(2), scores], dim=2),
    )
