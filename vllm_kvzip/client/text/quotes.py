"""Where a document says what an answer says: a passage of it, or nothing.

A passage is one sentence of the document or two that follow each other, so a quote always stands in
the document. What is judged is whether it says the same: every number of the answer must be in it,
and so must its words, weighted by how few sentences hold them.
"""

from __future__ import annotations

import difflib
import math
from collections import defaultdict
from dataclasses import dataclass

from vllm_kvzip.client.text.words import Word, sentences, words

SUPPORTING_SHARE = 0.75  # of the weight of an answer's words
RARE_SHARE = 0.6  # of the weight of a word that stands in one sentence; such words must be there
SIMILAR = 0.82  # of two spellings of a word, as difflib measures it
LEAST_LETTERS, SAME_LETTERS = 4, 3  # of words that may be spelled differently


@dataclass(frozen=True)
class Support:
    """The passage that says most of a claim.

    Attributes:
        start, end: characters in the searched text.
        share: of the weight of the claim's words, in [0, 1].
        missing: words of the claim that are rare or numbers, and not in the passage.
    """

    start: int
    end: int
    share: float
    missing: tuple[str, ...]

    @property
    def is_enough(self) -> bool:
        """Whether the passage says what the claim says."""
        return not self.missing and self.share >= SUPPORTING_SHARE


class PassageIndex:
    """The sentences of a text, found by their words.

    Args:
        text: to quote from.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._spans = sentences(text)
        self._holders: dict[str, set[int]] = defaultdict(set)
        for number, (begin, end) in enumerate(self._spans):
            for word in words(text[begin:end]):
                self._holders[word.form].add(number)
        self._known = [form for form in self._holders if len(form) >= LEAST_LETTERS]

    def support(self, claim: str) -> Support | None:
        """The passage that says most of a claim; None: none shares a word with it."""
        wanted = list({word.form: word for word in words(claim)}.values())
        holders = {word.form: self._sentences_with(word) for word in wanted}
        weights = {word.form: self._weight(holders[word.form]) for word in wanted}
        total = sum(weights.values())
        scores: dict[tuple[int, int], float] = defaultdict(float)
        for form, numbers in holders.items():
            for passage in {(n, n) for n in numbers} | {
                (first, first + 1)
                for n in numbers
                for first in (n - 1, n)
                if 0 <= first < len(self._spans) - 1
            }:
                scores[passage] += weights[form]
        if not scores:
            return None
        # of equals the shorter passage, and of those the first
        first, last = max(scores, key=lambda p: (round(scores[p], 9), p[0] - p[1], -p[0]))
        rare = RARE_SHARE * self._weight({0})
        missing = tuple(
            word.form
            for word in wanted
            if not holders[word.form] & {first, last}
            and (word.is_number or weights[word.form] >= rare)
        )
        if first != last:
            missing += self._mixed(wanted, holders, weights, (first, last))
        return Support(
            self._spans[first][0], self._spans[last][1], scores[first, last] / total, missing
        )

    def _mixed(
        self,
        wanted: list[Word],
        holders: dict[str, set[int]],
        weights: dict[str, float],
        passage: tuple[int, int],
    ) -> tuple[str, ...]:
        """Numbers of a claim that one sentence of a passage has, where the other has others.

        "The old gate is 4821. The new gate is 7730." does not say that the old gate is 7730: one
        sentence says all of it but the number, and names its own.
        """
        numbers = {word.form for word in wanted if word.is_number}
        others = [word.form for word in wanted if not word.is_number]
        whole = sum(weights[form] for form in others)
        mixed: list[str] = []
        for one in passage:
            begin, end = self._spans[one]
            own = {word.form for word in words(self.text[begin:end]) if word.is_number}
            said = sum(weights[form] for form in others if one in holders[form])
            if own - numbers and whole and said >= SUPPORTING_SHARE * whole:
                mixed += sorted(numbers - own)
        return tuple(mixed)

    def weight(self, text: str, words_of: str) -> float:
        """Weight of the words of ``words_of`` that stand in a passage ``text`` too."""
        there = {word.form for word in words(text)}
        found = 0.0
        for form, word in {word.form: word for word in words(words_of)}.items():
            if form in there or there & self._spellings(word):
                found += self._weight(self._sentences_with(word))
        return found

    def _weight(self, numbers: set[int]) -> float:
        """What a word tells: the fewer sentences hold it, the more."""
        return math.log(1 + (len(self._spans) + 1) / (len(numbers) + 1))

    def _sentences_with(self, word: Word) -> set[int]:
        forms = {word.form} | self._spellings(word)
        return set().union(*(self._holders.get(form, set()) for form in forms))

    def _spellings(self, word: Word) -> set[str]:
        """Words of the text that are the same in another form, such as a plural."""
        if word.is_number or len(word.form) < LEAST_LETTERS:
            return set()
        near = [known for known in self._known if known[:SAME_LETTERS] == word.form[:SAME_LETTERS]]
        return set(difflib.get_close_matches(word.form, near, n=5, cutoff=SIMILAR))
