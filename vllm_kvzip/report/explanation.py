"""What a server answers when it is asked to explain a context, checked."""

from __future__ import annotations

from base64 import b64decode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from vllm_kvzip.report.bitmaps import unpack

WHOLE, QUANTIZED = "whole", "quantized"


@dataclass(frozen=True)
class KeptTier:
    """KV pairs of one precision.

    Attributes:
        name: ``whole`` or ``quantized``.
        bits: as base64, as the server sent them.
        counts: tokens that each head keeps in this tier, ``[layers * KV heads]``.
    """

    name: str
    bits: str
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Explanation:
    """A compressed document; see ``POST /v1/kvzip/contexts/explain``.

    Attributes:
        token_texts: of the whole document.
        compressed_tokens: the first ones of them, which were compressed.
        layers: numbers of the compressed layers in the model.
        kv_heads: of a layer.
        tiers: what is kept of them.
        sink_tokens, recent_tokens: first and last of the compressed tokens, which every head keeps.
        blocks: before compression and after it.
        bytes: likewise, of the compressed layers.
        settings: name -> value.
        model: its name.
        versions: name -> version.
        created: when it was compressed.
    """

    token_texts: tuple[str, ...]
    compressed_tokens: int
    layers: tuple[int, ...]
    kv_heads: int
    tiers: tuple[KeptTier, ...]
    sink_tokens: int
    recent_tokens: int
    blocks: tuple[int, int]
    bytes: tuple[int, int]
    settings: dict[str, Any]
    model: str
    versions: dict[str, str]
    created: datetime

    @classmethod
    def read(cls, told: dict[str, Any]) -> Explanation:
        """A server's answer.

        Args:
            told: JSON of the answer.

        Raises:
            ValueError: if it is no such answer; in one sentence.
        """
        try:
            num_tokens, kv_heads = told["compressed_tokens"], told["kv_heads"]
            num_heads = len(told["layers"]) * kv_heads
            if num_tokens > len(told["token_texts"]):
                raise ValueError(f"{num_tokens} tokens have {len(told['token_texts'])} texts")
            tiers, seen = [], [0] * num_heads
            for tier in told["tiers"]:
                masks = unpack(b64decode(tier["kept"], validate=True), num_heads, num_tokens)
                if any(mask & before for mask, before in zip(masks, seen, strict=True)):
                    raise ValueError("a head keeps a token twice")
                seen = [mask | before for mask, before in zip(masks, seen, strict=True)]
                name = QUANTIZED if tier["quantized"] else WHOLE
                counts = tuple(mask.bit_count() for mask in masks)
                tiers.append(KeptTier(name, tier["kept"], counts))
            return cls(
                token_texts=tuple(told["token_texts"]),
                compressed_tokens=num_tokens,
                layers=tuple(told["layers"]),
                kv_heads=kv_heads,
                tiers=tuple(tiers),
                sink_tokens=told["sink_tokens"],
                recent_tokens=told["recent_tokens"],
                blocks=(told["blocks_before"], told["blocks_held"]),
                bytes=(told["bytes_before"], told["bytes_held"]),
                settings=told["settings"],
                model=told["model"],
                versions=told["versions"],
                created=datetime.fromtimestamp(told["created"], UTC),
            )
        except (KeyError, TypeError, ValueError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"the server's answer cannot be shown: {what}") from error

    @property
    def num_heads(self) -> int:
        """KV heads of all layers."""
        return len(self.layers) * self.kv_heads

    @property
    def shares(self) -> list[float]:
        """Share of the compressed tokens that each head keeps in any tier."""
        kept = [sum(counts) for counts in zip(*(tier.counts for tier in self.tiers), strict=True)]
        return [count / self.compressed_tokens for count in kept]

    def share_of(self, tier: KeptTier) -> float:
        """KV pairs of a tier / all KV pairs of the compressed tokens."""
        return sum(tier.counts) / (self.num_heads * self.compressed_tokens)
