"""The token rule of context-independent head budgets.

With a head profile, what a head may keep is known before the context is read: retrieval heads keep
everything, the others are streaming heads that only look at sinks and at what is recent
(DuoAttention, arXiv 2410.10819; KVzip's context-independent variant, arXiv 2505.23416 section 3.4).
"""

from __future__ import annotations

from typing import ClassVar

from vllm_kvzip.scoring.base import register_scorer
from vllm_kvzip.scoring.controls.streaming import StreamingScorer


@register_scorer
class ProfileScorer(StreamingScorer):
    """The most recent tokens; goes with budget ``profile``, the default when a profile is there."""

    name: ClassVar[str] = "profile"
