"""What a model is told; short, so that a small one can follow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

NOT_FOUND = "NOT FOUND"

_NOT_FOUND = re.compile(r"\bnot\s+(?:be\s+)?found\b", re.IGNORECASE)
_NOTHING_ELSE = re.compile(r"\W*not\s+found\W*", re.IGNORECASE)
_QUESTION_END = re.compile(r"(?<=\?)\s+|(?<=\uff1f)\s*")


def asked(document: str, prompt: str) -> list[dict[str, str]]:
    """A user's message that begins with a part of a document, as its context does."""
    return [{"role": "user", "content": f"{document}\n\n{prompt}"}]


def answer_prompt(question: str) -> str:
    """Asks for the answer in the words of the text."""
    return (
        f"{question}\nAnswer in one sentence with the words of the text. If the text does not say "
        f"it, answer: {NOT_FOUND}"
    )


def quote_prompt(question: str) -> str:
    """Asks for the sentence that says it."""
    return (
        f"Copy the sentence of the text that answers this question: {question}\nIf there is none, "
        f"answer: {NOT_FOUND}"
    )


def repeat_prompt() -> str:
    """Asks for a sentence whose beginning opens the answer; see :mod:`.verification`."""
    return "Repeat the sentence of the text word for word."


def merge_prompt(question: str, notes: Sequence[str]) -> str:
    """Asks for one answer out of several."""
    listed = "\n".join(f"- {note}" for note in notes)
    return f"Notes:\n{listed}\n\n{question}\nAnswer with the words of the notes, and nothing else."


def says_not_found(answer: str) -> bool:
    """Whether a model may say that the text does not say it.

    "The wreck was not found until 1985." is another matter: whoever asks looks it up first.
    """
    return not answer.strip() or _NOT_FOUND.search(answer) is not None


def is_not_found(answer: str) -> bool:
    """Whether a model says that the text does not say it, and nothing else."""
    return not answer.strip() or _NOTHING_ELSE.fullmatch(answer) is not None


def split_question(question: str) -> list[str]:
    """Questions that stand behind each other; each is asked by itself.

    What follows the last question mark belongs to the question before it.
    """
    found: list[str] = []
    for one in _QUESTION_END.split(question.strip()):
        if found and one and one[-1] not in "?\uff1f":
            found[-1] += f" {one}"
        elif one:
            found.append(one)
    return found
