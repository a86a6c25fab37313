"""What a reader answers: claims, the quotes behind them, and what became of each."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vllm_kvzip.client.statistics import Statistics

NOT_IN_DOCUMENT = "not in the document"

Verdict = Literal["unquoted", "quoted", "confirmed", "revised", "rejected", "unverified"]
"""What became of a claim.

``quoted``: a passage of the document says it. ``confirmed``: the model also says it again without
having seen it. ``revised``: the model then said something else, which the document says.
``rejected``: it is not in the answer. ``unverified``: it could not be checked. ``unquoted``: no
passage says it, and the reader was told to do without.
"""


@dataclass(frozen=True)
class Quote:
    """A passage that stands in a document word for word.

    Attributes:
        document: its name.
        part: number of the part, from 0.
        start, end: characters in the document's text.
        text: these characters.
        page: of a PDF, from 1.
    """

    document: str
    part: int
    start: int
    end: int
    text: str
    page: int | None = None


@dataclass(frozen=True)
class Claim:
    """A sentence of an answer.

    Attributes:
        text: of the sentence.
        question: that it answers.
        part: number among all asked parts of the one that said it.
        quote: where the document says it; None: nowhere.
        verdict: see :data:`Verdict`.
        reason: why it was rejected or is unverified, one sentence; else empty.
        draft: what it said before it was revised; else empty.
        more_quotes: where the document says the rest, if it was merged out of several claims.
    """

    text: str
    question: str
    part: int
    quote: Quote | None
    verdict: Verdict
    reason: str = ""
    draft: str = ""
    more_quotes: tuple[Quote, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a reader found.

    Attributes:
        question: that was asked.
        text: the answer, or ``not in the document``.
        found: whether a document says it.
        claims: what the answer is made of.
        rejected: claims of drafts that are not in the answer, with the reason.
        merges: calls that merged answers of parts.
        depth: how often answers of parts were merged; 0: they did not need it.
        notes: whatever did not go as it should, one sentence each.
        statistics: what it cost.
    """

    question: str
    text: str
    found: bool
    claims: list[Claim]
    rejected: list[Claim]
    merges: int
    depth: int
    notes: list[str]
    statistics: Statistics

    @property
    def quotes(self) -> list[Quote]:
        """Passages behind the answer, each once, in order."""
        found = ((claim.quote, *claim.more_quotes) for claim in self.claims)
        return list(dict.fromkeys(quote for quotes in found for quote in quotes if quote))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**dataclasses.asdict(self), "quotes": [dataclasses.asdict(q) for q in self.quotes]}
