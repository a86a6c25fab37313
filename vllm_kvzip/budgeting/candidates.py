"""What competes in a later compression of a request: what was kept before, and what is new."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_kvzip.core import CompressedPrefix, KeepPlan


def scores_of(scores: torch.Tensor, keep: KeepPlan) -> torch.Tensor:
    """Scores of what is kept, in the order of the plan; minus infinity where there is no token.

    Args:
        scores: float32 ``[L, H, T]``.
        keep: of a tier.
    """
    heads = torch.arange(keep.pages.numel(), device=scores.device)
    heads = heads.repeat_interleave(keep.pages.flatten(), output_size=len(keep.positions))
    found = scores.flatten(0, 1)[heads[:, None], keep.positions.clamp(min=0)]
    return found.masked_fill_(keep.positions < 0, float("-inf")).flatten()


def with_earlier(
    earlier: CompressedPrefix, sources: torch.Tensor, scores: torch.Tensor, page_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates of a later compression: what was kept before, then what is new.

    Heads kept different numbers of pages, so their earlier pages are padded at the end; a pad has
    a score of minus infinity and is never chosen. Order within a head stays that of positions.

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
