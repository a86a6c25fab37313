"""What an answer cost: counted from the server's own answers, or read from its metrics."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm_kvzip.client.library import ReadPart
    from vllm_kvzip.client.server import Reply, Server, ServerFacts

FROM_ANSWERS, FROM_METRICS = "answers", "server metrics, requests of others included"
_CACHED = "vllm:prompt_tokens_cached_total"
_FIRST_SECONDS, _FIRST_COUNT = (
    f"vllm:time_to_first_token_seconds_{what}" for what in ("sum", "count")
)
_DRAFTED, _ACCEPTED = (
    f"vllm:spec_decode_num_{what}_tokens_total" for what in ("draft", "accepted")
)


@dataclass(frozen=True)
class Statistics:
    """What a question, or a reading, cost. None: the server does not tell.

    Attributes:
        calls: requests that the model answered.
        retries: how often one of these calls was sent again.
        parts_read_again: parts whose context was gone from the cache.
        prompt_tokens: of all calls.
        reused_tokens: of these, that needed no prefill.
        read_tokens: of these, that needed it.
        output_tokens: of all answers.
        seconds: in all, by the client's clock.
        first_token_seconds: mean over the calls; waiting in the server's queue counts only where it
            is from the metrics.
        tokens_per_second: output tokens over ``seconds``.
        accepted_share: accepted of drafted tokens, where the server speculates.
        keep_ratio: KV blocks of the parts after compression over those before.
        blocks_before, blocks_held: of all parts.
        estimated_bytes_saved: of all parts; blocks times the server's bytes of a block.
        sources: where ``reused_tokens``, ``first_token_seconds`` and ``accepted_share`` are from.
    """

    calls: int
    retries: int
    parts_read_again: int
    prompt_tokens: int
    reused_tokens: int | None
    read_tokens: int | None
    output_tokens: int
    seconds: float
    first_token_seconds: float | None
    tokens_per_second: float
    accepted_share: float | None
    keep_ratio: float | None
    blocks_before: int
    blocks_held: int
    estimated_bytes_saved: int | None
    sources: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass
class Tally:
    """Counts while a question is asked.

    Args:
        server: that is asked.
        before: its metrics when the count began.

    Attributes:
        replies: of all calls.
        parts_read_again: see :class:`Statistics`.
    """

    server: Server
    before: dict[str, float]
    replies: list[Reply] = field(default_factory=list)
    parts_read_again: int = 0
    _begin: float = field(default_factory=time.perf_counter)

    @classmethod
    async def start(cls, server: Server) -> Tally:
        """Begin to count."""
        begin = time.perf_counter()
        return cls(server, await server.metrics(), _begin=begin)

    async def statistics(self, parts: Iterable[ReadPart]) -> Statistics:
        """What it was.

        Args:
            parts: that were asked.
        """
        seconds = time.perf_counter() - self._begin
        facts = await self.server.facts()
        replies, sources = self.replies, {}
        grown: dict[str, float] = {}
        if any(r.cached_tokens is None or r.first_token_seconds is None for r in replies):
            after = await self.server.metrics()
            grown = {name: value - self.before.get(name, 0.0) for name, value in after.items()}
        prompt_tokens = sum(reply.prompt_tokens for reply in replies)
        reused = _sum(reply.cached_tokens for reply in replies)
        sources["reused_tokens"] = FROM_ANSWERS
        if reused is None and _CACHED in grown:
            reused, sources["reused_tokens"] = round(grown[_CACHED]), FROM_METRICS
        first = _sum(reply.first_token_seconds for reply in replies)
        first = None if first is None or not replies else first / len(replies)
        sources["first_token_seconds"] = FROM_ANSWERS
        if first is None and grown.get(_FIRST_COUNT):
            first = grown[_FIRST_SECONDS] / grown[_FIRST_COUNT]
            sources["first_token_seconds"] = FROM_METRICS
        drafted: float | None = _sum(reply.drafted for reply in replies)
        accepted: float | None = _sum(reply.accepted for reply in replies)
        sources["accepted_share"] = FROM_ANSWERS
        if drafted is None and grown.get(_DRAFTED):
            drafted, accepted = grown[_DRAFTED], grown.get(_ACCEPTED, 0.0)
            sources["accepted_share"] = FROM_METRICS
        output_tokens = sum(reply.output_tokens for reply in replies)
        blocks = _blocks(parts, facts)
        return Statistics(
            calls=len(replies),
            retries=sum(reply.retries for reply in replies),
            parts_read_again=self.parts_read_again,
            prompt_tokens=prompt_tokens,
            reused_tokens=reused,
            read_tokens=None if reused is None else max(0, prompt_tokens - reused),
            output_tokens=output_tokens,
            seconds=seconds,
            first_token_seconds=first,
            tokens_per_second=output_tokens / seconds if seconds else 0.0,
            accepted_share=accepted / drafted if drafted and accepted is not None else None,
            sources=sources,
            **blocks,
        )


def _sum(values: Iterable[Any]) -> Any:
    """The sum; None if one of them is."""
    found = list(values)
    return None if None in found else sum(found)


def _blocks(parts: Iterable[ReadPart], facts: ServerFacts) -> dict[str, Any]:
    before = held = 0
    for part in parts:
        before += part.blocks_before
        held += part.blocks_held
    each = facts.estimated_block_bytes
    return {
        "blocks_before": before,
        "blocks_held": held,
        "keep_ratio": held / before if before else None,
        "estimated_bytes_saved": None if each is None else round((before - held) * each),
    }
