"""What the answers of a model over compressed contexts are worth; see ``run.py``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_kvzip.evaluation.intervals import Estimate, mean_of_clusters

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_kvzip.evaluation.quality.lessons import Lesson
    from vllm_kvzip.evaluation.tasks.documents import Document


@dataclass
class Answers:
    """What a run made of one question.

    Attributes:
        greedy: its own choices, as many tokens as the reference answer has; None: there is none.
        forced: led through the reference answer; None: there is none, or nobody could be led.
        continued: led through the uncompressed model's own continuation; None: nobody could be.
    """

    greedy: Lesson | None = None
    forced: Lesson | None = None
    continued: Lesson | None = None

    @property
    def lessons(self) -> list[Lesson]:
        """Those that are there."""
        return [lesson for lesson in (self.greedy, self.forced, self.continued) if lesson]


@dataclass
class Measured:
    """What a run found. Lists have an entry a document: a sum over its questions, and of how many.

    Attributes:
        counts: right answers, or answer tokens; see :class:`documents.Question`.
        nats: negative log-likelihood of the scored tokens of the reference answers.
        divergences: KL(uncompressed || this run) along the uncompressed model's own continuation,
            by token.
        same_choices: tokens of these that this run finds most likely as well.
        held: bytes of the contexts' blocks after compression / before.
        blocks: blocks of each context after compression, and before, as the engine tells.
        estimates: what compressing it was estimated to cost, nats a token; empty where no quality
            loss decided.
    """

    counts: list[tuple[int, int]] = field(default_factory=list)
    nats: list[tuple[float, int]] = field(default_factory=list)
    divergences: list[tuple[float, int]] = field(default_factory=list)
    same_choices: list[tuple[int, int]] = field(default_factory=list)
    held: float = 1.0
    blocks: list[tuple[int, int]] = field(default_factory=list)
    estimates: list[float] = field(default_factory=list)

    def tell(self, told: Mapping[str, Any]) -> None:
        """Note what an engine told of the next document's context."""
        self.blocks.append((told["blocks_held"], told["blocks_before"]))
        if (estimate := told.get("estimated_loss")) is not None:
            self.estimates.append(estimate)

    def add(self, document: Document, answers: Sequence[Answers]) -> None:
        """Count what was answered to the questions about the next document."""
        pairs = list(zip(document.questions, answers, strict=True))
        right = [question.right(found.greedy.output) for question, found in pairs if found.greedy]
        self.counts.append(_sum(right))
        nats = [
            -found.forced.log_likelihoods[place]
            for question, found in pairs
            if found.forced is not None
            for place in question.scored_places
        ]
        self.nats.append((sum(nats), len(nats)))
        followed = [found.continued for found in answers if found.continued is not None]
        divergences = [kl for lesson in followed for kl in lesson.divergences.values()]
        same = [same for lesson in followed for same in lesson.same_choices.values()]
        self.divergences.append((sum(divergences), len(divergences)))
        self.same_choices.append((sum(same), len(same)))

    def of(self, members: Sequence[bool]) -> Measured:
        """The same of some documents only, ``members`` having an entry a document."""

        def chosen(values: list[Any]) -> list[Any]:
            return [value for value, member in zip(values, members, strict=True) if member]

        blocks = chosen(self.blocks) if self.blocks else []
        held = _sum(blocks)
        return Measured(
            counts=chosen(self.counts),
            nats=chosen(self.nats),
            divergences=chosen(self.divergences),
            same_choices=chosen(self.same_choices),
            held=held[0] / held[1] if blocks else self.held,
            blocks=blocks,
            estimates=chosen(self.estimates) if self.estimates else [],
        )

    def mean_nats(self) -> Estimate | None:
        """Negative log-likelihood of an answer's token; None: not measured."""
        return mean_of_clusters(self.nats)

    def lost_nats(self, full: Measured) -> Estimate | None:
        """How much higher that is than in another run over the same documents."""
        pairs = zip(self.nats, full.nats, strict=True)
        return mean_of_clusters([(own - other, n) for (own, n), (other, _) in pairs])

    def divergence(self) -> Estimate | None:
        """KL in nats a token; None: not measured."""
        return mean_of_clusters(self.divergences)

    def same_share(self) -> Estimate | None:
        """Share of equal first choices; None: not measured."""
        return mean_of_clusters(self.same_choices)


def _sum(pairs: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(first for first, _ in pairs), sum(second for _, second in pairs)
