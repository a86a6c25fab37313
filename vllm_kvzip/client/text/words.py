"""Words and sentences of a text in any script, with their places."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import pairwise

# Scripts that put no blanks between words: each letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"\d+(?:[.,:]\d+)+|[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]\s*|\n\s*\n\s*")


@dataclass(frozen=True)
class Word:
    """A word of a text.

    Attributes:
        form: in lower case, compatibility characters unified.
        start, end: its characters in the text.
    """

    form: str
    start: int
    end: int

    @property
    def is_number(self) -> bool:
        """Whether it has a digit, so that another spelling is another value."""
        return any(map(str.isdigit, self.form))


def words(text: str) -> list[Word]:
    """The words of a text, in order."""
    return [
        Word(unicodedata.normalize("NFKC", match.group()).casefold(), match.start(), match.end())
        for match in _WORD.finditer(text)
    ]


def sentences(text: str) -> list[tuple[int, int]]:
    """Begin and end of each sentence that has a word; paragraphs end sentences too."""
    cuts = [0, *(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]
    found = []
    for begin, end in pairwise(cuts):
        sentence = text[begin:end]
        begin += len(sentence) - len(sentence.lstrip())
        end -= len(sentence) - len(sentence.rstrip())
        if _WORD.search(text, begin, end):
            found.append((begin, end))
    return found
