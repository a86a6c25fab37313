"""Words and sentences of a text in any script, with their places."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import groupby, pairwise

# Scripts that put no blanks between words: each letter counts as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_LAST_MARK = 0x1FFF  # behind the scripts whose letters take marks


def _marks() -> str:
    """Combining marks as ranges of a character class: accents, vowel signs."""
    is_mark = [unicodedata.category(chr(code)).startswith("M") for code in range(_LAST_MARK + 1)]
    ranges, code = [], 0
    for mark, run in groupby(is_mark):
        length = len(list(run))
        if mark:
            ranges.append(f"{chr(code)}-{chr(code + length - 1)}")
        code += length
    return "".join(ranges)


_LETTER = rf"[^\W_{_UNSPACED}]"
_WORD = re.compile(
    rf"(?<!\w)[-\u2212]\d+(?:[.,:]\d+)*|\d+(?:[.,:]\d+)+|[{_UNSPACED}]|"
    rf"{_LETTER}(?:{_LETTER}|[{_marks()}])*"
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]\s*|\n\s*\n\s*")
_BEFORE_STOP = re.compile(r"(?:^|[^\w.])(?:\w\.)*(\w+)$")
_LONGEST_ABBREVIATION = 24  # characters before a full stop that are looked at
# A name or a number follows these, so their full stop ends no sentence.
_TITLE = re.compile(
    "capt|col|dr|frau|gen|gov|hr|lt|messrs|mlle|mme|mr|mrs|ms|mt|prof|rep|rev|sgt", re.IGNORECASE
)
# Behind these a sentence may end; it does not where a number or a small letter follows.
_SHORT = re.compile(
    "abb|abs|al|approx|apr|art|aug|bd|bzw|ca|cf|ch|co|dec|dept|eds?|eq|est|etc|feb|figs?|inc|jan|"
    "jul|jun|ltd|mar|nos?|nov|nr|oct|op|pp|resp|secs?|sept?|st|vgl|vols?|vs",
    re.IGNORECASE,
)


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


def _is_inside(text: str, stop: re.Match[str]) -> bool:
    """Whether a full stop belongs to an abbreviation or a list's number, not to a sentence."""
    gap = stop.group()
    if not gap.startswith(".") or gap[1:].strip() or gap.count("\n") > 1:
        return False
    place = stop.start()
    before = _BEFORE_STOP.search(text, max(0, place - _LONGEST_ABBREVIATION), place)
    if before is None:
        return False
    word, following = before.group(1), text[stop.end() : stop.end() + 1]
    goes_on = following.isdigit() or following.islower()
    if word.isdigit():
        line = text.rfind("\n", 0, place) + 1
        is_listed = len(word) < len("1902") and not text[line : before.start(1)].strip()
        return following.islower() or is_listed
    if len(word) == 1 and word.isalpha():
        return True
    return is_title(word) or bool(goes_on and _SHORT.fullmatch(word))


def is_title(word: str) -> bool:
    """Whether a word stands before names, such as Dr or Ms."""
    return _TITLE.fullmatch(word) is not None


def words(text: str) -> list[Word]:
    """The words of a text, in order."""
    return [
        Word(_form(match.group()), match.start(), match.end()) for match in _WORD.finditer(text)
    ]


def _form(word: str) -> str:
    return unicodedata.normalize("NFKC", word).casefold().replace("\u2212", "-")


def sentences(text: str) -> list[tuple[int, int]]:
    """Begin and end of each sentence that has a word; paragraphs end sentences too.

    The full stop of "Dr. Smith", "J. R. Smith", "No. 12" and of a list's "1." ends none.
    """
    ends = (match for match in _SENTENCE_END.finditer(text) if not _is_inside(text, match))
    cuts = [0, *(match.end() for match in ends), len(text)]
    found = []
    for begin, end in pairwise(cuts):
        sentence = text[begin:end]
        begin += len(sentence) - len(sentence.lstrip())
        end -= len(sentence) - len(sentence.rstrip())
        if _WORD.search(text, begin, end):
            found.append((begin, end))
    return found
