"""Contexts of running text with questions about them, in the style of RULER (arXiv 2404.06654).

For any model: made from a text and a tokenizer, at any length.

    facts           a few sentences such as "The gate code of the mill is 4821." hidden far apart in
                    the text; each is asked for (RULER's needles)
    many-facts      such sentences wherever one looks, a few of which are asked for (multi-key)
    values          three numbers of one thing, far apart, which are wanted in order (multi-value)
    several         one question for three facts (multi-query)
    variables       "VAR BKT = VAR AXQ." in chains; which variables have the value? (tracking)
    common-word     a list of words, one of which comes up far more often (common words)
    frequent-words  invented words with frequencies by Zipf's law; the first three (frequent words)
    cloze           how a sentence of the text itself goes on: its last number, name or long word
    verbatim        24 words of a passage, continued from six of its words
    open            questions without a reference answer, such as for a summary: only the distance
                    from the uncompressed model is measured
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_kvzip.errors import ConfigError
from vllm_kvzip.evaluation.tasks.documents import Document
from vllm_kvzip.evaluation.tasks.text_weaving import USED_SHARE, Weaver

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.random import Generator as Rng

    from vllm_kvzip.evaluation.tasks.documents import Question
    from vllm_kvzip.evaluation.tasks.text_frame import TextFrame

PLACES = (
    "mill", "brewery", "harbour office", "clock tower", "boathouse", "old theatre", "toll house",
    "sawmill", "water works", "rope factory", "sugar refinery", "post office", "salt mine",
    "tram depot", "fish market", "glass works", "town archive", "riding school", "power station",
    "ice house", "botanical garden", "printing shop", "weather station", "grain store",
)  # fmt: skip
NUMBERS = (
    "gate code", "safe combination", "telephone extension", "locker number", "licence number",
    "invoice number", "parcel number", "key number",
)  # fmt: skip
OPEN_QUESTIONS = (
    "What is the text above about? Answer in two sentences.",
    "Which people are named in the text above, and what do they do?",
    "Which numbers does the text above mention, and what do they mean?",
    "What happens at the end of the text above?",
    "Explain one part of the text above to a child.",
    "Which question would you ask the author of the text above?",
)
FACTS_SHARE = 0.4  # of the tokens of ``many-facts`` that belong to facts
NUMBERS_ASKED = 3  # of ``values`` and ``several``
NUM_HOPS = 4  # variables of a chain
COMMON_SHARE = 0.15  # of the words of ``common-word`` that are the one
MIN_LIST_WORDS = 40
MIN_CLOZE_WORDS = 8
HINT_WORDS, COPY_WORDS = 6, 24


@dataclass(frozen=True)
class Fact:
    """That a number belongs to a thing."""

    place: str
    number: str
    code: str

    @property
    def thing(self) -> str:
        """What has the number."""
        return f"{self.number} of the {self.place}"

    @property
    def sentence(self) -> str:
        """As it stands in the context."""
        return f"The {self.thing} is {self.code}."


def facts(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """As many facts as questions."""
    found = _facts(rng, count)
    context = weaver.context(rng, num_tokens, [fact.sentence for fact in found])
    return Document(context, [_question(weaver.frame, fact) for fact in found])


def many_facts(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """More facts than questions: the others look like what is asked for."""
    sample = _facts(rng, 1)[0].sentence
    fitting = int(FACTS_SHARE * num_tokens / len(weaver.frame.ids(f"{sample} ")))
    found = _facts(rng, min(max(fitting, count), len(PLACES) * len(NUMBERS)))
    context = weaver.context(rng, num_tokens, [fact.sentence for fact in found])
    asked = rng.choice(len(found), count, replace=False)
    return Document(context, [_question(weaver.frame, found[i]) for i in asked])


def values(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """Several numbers of each thing, in sentences far apart."""
    things = _facts(rng, count)
    codes = [_codes(rng, NUMBERS_ASKED) for _ in things]
    order = rng.permutation(np.repeat(np.arange(count), NUMBERS_ASKED))
    rest = [iter(each) for each in codes]
    sentences = [f"One {things[i].thing} is {next(rest[i])}." for i in order]
    context = weaver.context(rng, num_tokens, sentences)
    questions = [
        weaver.frame.question(
            f"The text names {NUMBERS_ASKED} numbers, each of which is one {thing.thing}. "
            f"Which are they, in the order of the text?",
            "They are",
            f" {_listed(each)}.",
        )
        for thing, each in zip(things, codes, strict=True)
    ]
    return Document(context, questions)


def several(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """Several facts are wanted at once."""
    found = _facts(rng, max(count, NUMBERS_ASKED))
    context = weaver.context(rng, num_tokens, [fact.sentence for fact in found])
    questions = []
    for _ in range(count):
        chosen = [found[i] for i in rng.choice(len(found), NUMBERS_ASKED, replace=False)]
        things = _listed([f"the {fact.thing}" for fact in chosen])
        asked = f"What are {things}, in this order?"
        codes = _listed([fact.code for fact in chosen])
        questions.append(weaver.frame.question(asked, "They are", f" {codes}."))
    return Document(context, questions)


def variables(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """Chains of variables that point to each other, in the order of the text."""
    names = _names(rng, count * NUM_HOPS, letters=3, capital=True)
    chains = [names[start::count] for start in range(count)]
    numbers = _codes(rng, count)
    order = rng.permutation(np.repeat(np.arange(count), NUM_HOPS))
    sentences, hops = [], [0] * count
    for which in order:
        chain, hop = chains[which], hops[which]
        value = f"VAR {chain[hop - 1]}" if hop else numbers[which]
        sentences.append(f"VAR {chain[hop]} = {value}.")
        hops[which] += 1
    context = weaver.context(rng, num_tokens, sentences)
    questions = [
        weaver.frame.question(
            f"Which variables have the value {number}, directly or through another variable? Name "
            f"them in the order of the text.",
            f"The variables that have the value {number} are",
            f" {_listed(chain)}.",
        )
        for number, chain in zip(numbers, chains, strict=True)
    ]
    return Document(context, questions)


def common_word(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """A list of words of the text in which one comes up far more often; one question."""
    known = sorted(set(re.findall(r"\b[a-z]{4,}\b", "".join(weaver.source.pieces))))
    if len(known) < MIN_LIST_WORDS:
        raise ConfigError(f"--text has only {len(known)} different words; name more files.")
    common = str(rng.choice(known))
    shares = np.full(len(known), (1 - COMMON_SHARE) / (len(known) - 1))
    shares[known.index(common)] = COMMON_SHARE
    context = _list_context(weaver.frame, rng, num_tokens, known, shares)
    asked = "Which word is the most common one in the list above?"
    opening = "The most common word in the list is"
    return Document(context, [weaver.frame.question(asked, opening, f" {common}.")][:count])


def frequent_words(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """Invented words, each the less frequent the higher its rank; one question."""
    words = _names(rng, 60, letters=6, capital=False)
    weights = 1 / np.arange(1, len(words) + 1) ** 2.0
    context = _list_context(weaver.frame, rng, num_tokens, words, weights / weights.sum())
    asked = "Which three words are the most frequent ones above? Name the most frequent one first."
    answer = f" {_listed(words[:3])}."
    opening = "The three most frequent words are"
    return Document(context, [weaver.frame.question(asked, opening, answer)][:count])


def cloze(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """The text itself is what is asked for."""
    pieces, context = _plain(weaver, rng, num_tokens)
    whole = "".join(pieces)
    found = [
        (cut, piece) for piece in pieces if (cut := cloze_cut(piece)) and whole.count(piece) == 1
    ]
    telling = [pair for pair in found if any(map(str.isdigit, pair[1][slice(*pair[0])]))]
    others = [pair for pair in found if pair not in telling]
    chosen = [*_shuffled(rng, telling), *_shuffled(rng, others)][:count]
    questions = [
        weaver.frame.question(
            f'How does the sentence of the text go on that begins with "{_beginning(piece)}"? '
            f"Repeat it word for word.",
            piece[:begin].rstrip(),
            f" {piece[begin:end]}",
        )
        for (begin, end), piece in chosen
    ]
    return Document(context, questions)


def _beginning(piece: str) -> str:
    return " ".join(piece.split()[:HINT_WORDS])


def cloze_cut(piece: str) -> tuple[int, int] | None:
    """Begin and end of the word that a sentence is asked to go on with; None: it has no such word.

    Its last number, else its last name, else its last word of five letters or more, behind at least
    seven other words.
    """
    words = list(re.finditer(r"[^\W_]+(?:[.,'-][^\W_]+)*", piece))[MIN_CLOZE_WORDS - 1 :]
    if not re.search(r"[.!?][\"')]*\s*$", piece):
        return None
    for wanted in (r"\d", r"^[A-Z]", r".{5}"):
        fitting = [word for word in words if re.search(wanted, word.group())]
        if fitting:
            return fitting[-1].span()
    return None


def verbatim(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """Passages are wanted word for word, from the beginning of a sentence."""
    pieces, context = _plain(weaver, rng, num_tokens)
    text = "".join(pieces)
    starts = np.cumsum([0, *map(len, pieces)])[:-1]
    questions: list[Question] = []
    for start in _shuffled(rng, starts.tolist()):
        words = list(re.finditer(r"\S+", text[start:]))[: HINT_WORDS + COPY_WORDS]
        if len(words) < HINT_WORDS + COPY_WORDS or len(questions) == count:
            continue
        hint_end, end = start + words[HINT_WORDS - 1].end(), start + words[-1].end()
        hint = text[start:hint_end]
        if text.count(hint) == 1:
            asked = f'Repeat the part of the text that begins with "{hint}", word for word.'
            answer = text[hint_end:end]
            questions.append(weaver.frame.question(asked, hint, answer, is_whole=False))
    return Document(context, questions)


def open_questions(weaver: Weaver, rng: Rng, num_tokens: int, count: int) -> Document:
    """Nobody knows the right answer."""
    context = weaver.context(rng, num_tokens, [])
    asked = [OPEN_QUESTIONS[i % len(OPEN_QUESTIONS)] for i in range(count)]
    return Document(context, [weaver.frame.question(question) for question in asked])


TEXT_TASKS = {
    "facts": facts,
    "many-facts": many_facts,
    "values": values,
    "several": several,
    "variables": variables,
    "common-word": common_word,
    "frequent-words": frequent_words,
    "cloze": cloze,
    "verbatim": verbatim,
    "open": open_questions,
}


def _facts(rng: Rng, count: int) -> list[Fact]:
    """Facts about different things; different places as long as there are enough.

    Raises:
        ConfigError: if there are not so many things.
    """
    if count > len(PLACES) * len(NUMBERS):
        raise ConfigError(f"--questions must be at most {len(PLACES) * len(NUMBERS)}.")
    rounds = [rng.permutation(len(PLACES)) for _ in NUMBERS]
    turn = rng.permutation(len(NUMBERS))
    found = [
        Fact(PLACES[place], NUMBERS[turn[(nth + place) % len(NUMBERS)]], code)
        for (nth, place), code in zip(
            [(nth, place) for nth, places in enumerate(rounds) for place in places][:count],
            _codes(rng, count),
            strict=True,
        )
    ]
    return found


def _question(frame: TextFrame, fact: Fact) -> Question:
    return frame.question(f"What is the {fact.thing}?", f"The {fact.thing} is", f" {fact.code}.")


def _codes(rng: Rng, count: int) -> list[str]:
    """Different numbers of four digits."""
    return [str(code) for code in rng.choice(np.arange(1000, 10000), count, replace=False)]


def _names(rng: Rng, count: int, letters: int, capital: bool) -> list[str]:
    """Different words that do not exist."""
    alphabet = list("ABCDEFGHJKLMNPQRSTUVWXYZ" if capital else "abcdefghijklmnoprstuvwz")
    names: dict[str, None] = {}
    while len(names) < count:
        names["".join(rng.choice(alphabet, letters))] = None
    return list(names)


def _listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(words[:-1])} and {words[-1]}" if len(words) > 1 else words[0]


def _list_context(
    frame: TextFrame, rng: Rng, num_tokens: int, words: Sequence[str], shares: np.ndarray
) -> list[int]:
    """Words drawn by their shares, a numbered line each, in a context of so many tokens."""
    drawn = rng.choice(len(words), num_tokens // 2, p=shares)  # a line has more than 2
    text = "".join(f"{number}. {words[which]}\n" for number, which in enumerate(drawn, 1))
    return frame.context(text, num_tokens)


def _plain(weaver: Weaver, rng: Rng, num_tokens: int) -> tuple[list[str], list[int]]:
    """Pieces that surely stand in a context of running text, and the context."""
    room = num_tokens - len(weaver.frame.head_ids)
    pieces, starts = weaver.pieces(rng, room)
    inside = [p for p, begin in zip(pieces, starts[1:], strict=False) if begin <= USED_SHARE * room]
    return inside, weaver.frame.context("".join(pieces), num_tokens)


def _shuffled(rng: Rng, items: Sequence[Any]) -> list[Any]:
    return [items[i] for i in rng.permutation(len(items))]
