"""Which compressed prefixes later requests may start from, and for how long."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReuseRule:
    """How compressed prefixes are reused.

    Attributes:
        fingerprint: hexadecimal digest of everything that shapes a compressed prefix but its keep
            ratio.
        prefer_raw: start from the raw prefix when both are cached.
        ttl_seconds: drop a prefix that no request has used for this time; None keeps it until the
            pool needs its blocks.
        observation_tokens: how many of the context's last queries the scorer looks at; 0 when it
            looks at keys and values only. If it does, only declared contexts are cached: those of
            other prompts are scored by the whole prompt.
        round_observation_tokens: how many queries it looks at in a round.
        keeps_tokens: keep the tokens of cached prefixes, for those that travel to other engines.
    """

    fingerprint: str = ""
    prefer_raw: bool = False
    ttl_seconds: float | None = None
    observation_tokens: int = 0
    round_observation_tokens: int = 0
    keeps_tokens: bool = False
