"""Contexts with questions about them: what the evaluation scripts send, whatever made them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Question:
    """What follows a context, and what should come next. All lists hold token ids.

    Attributes:
        tokens: the question and whatever opens the answer.
        answer: the reference answer; empty where there is none, as for a summary.
        scored: which tokens of the answer count, such as the digits of a code; empty for all.
        is_whole: the answer is right when all scored tokens are, and counts once; otherwise each
            token counts.
        num_opening_tokens: how many of the last ``tokens`` do not ask but open the answer, such as
            a chat template's assistant turn.
    """

    tokens: list[int]
    answer: list[int]
    scored: list[bool] = field(default_factory=list)
    is_whole: bool = False
    num_opening_tokens: int = 0

    @property
    def asked(self) -> list[int]:
        """The question without what opens the answer."""
        return self.tokens[: len(self.tokens) - self.num_opening_tokens]

    @property
    def scored_places(self) -> list[int]:
        """Positions of the answer's tokens that count."""
        return [i for i in range(len(self.answer)) if not self.scored or self.scored[i]]

    def right(self, output: Sequence[int]) -> tuple[int, int]:
        """Right answers and all of them, or tokens, in an answer as long as the reference."""
        places = self.scored_places
        right = sum(output[place] == self.answer[place] for place in places)
        if self.is_whole:
            return int(right == len(places)), int(bool(places))
        return right, len(places)


@dataclass(frozen=True)
class Document:
    """A context and questions about it.

    Attributes:
        tokens: token ids of the context, which is compressed before any question is read.
        questions: about it.
    """

    tokens: list[int]
    questions: list[Question]
