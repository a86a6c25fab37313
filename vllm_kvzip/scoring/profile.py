"""The token rule of context-independent head budgets.

With a head profile, what a head may keep is known before the context is read (KVzip's
context-independent variant, arXiv 2505.23416 section 3.4). Heads that matter keep nearly all, the
others little; inside a head, KeyDiff picks the tokens.
"""

from __future__ import annotations

from typing import ClassVar

from vllm_kvzip.scoring.base import register_scorer
from vllm_kvzip.scoring.keydiff import KeyDiffScorer


@register_scorer
class ProfileScorer(KeyDiffScorer):
    """KeyDiff's scores; goes with budget ``profile`` and is the default when a profile is there."""

    name: ClassVar[str] = "profile"
