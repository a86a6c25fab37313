"""A long document with hidden facts, and questions for them, for pairs, and for absent ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_kvzip.errors import ConfigError
from vllm_kvzip.evaluation.tasks.text_source import DEFAULT_TEXT
from vllm_kvzip.evaluation.tasks.text_tasks import NUMBERS, PLACES, Fact

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True)
class AskedFacts:
    """A question, and the numbers that answer it; none: the document does not say it."""

    text: str
    codes: tuple[str, ...]


@dataclass(frozen=True)
class HiddenFacts:
    """A document and questions about it.

    Attributes:
        text: of the document.
        single: questions, one for each hidden fact.
        absent: questions for facts that are not in it, though their words are.
        pairs: questions for two facts each.
    """

    text: str
    single: list[AskedFacts]
    absent: list[AskedFacts]
    pairs: list[AskedFacts]


def hide_facts(
    count_tokens: Callable[[str], int],
    *,
    num_tokens: int,
    num_facts: int,
    num_absent: int,
    num_pairs: int,
    seed: int = 0,
) -> HiddenFacts:
    """Prose, then Python's own documentation, with one sentence for each fact at equal distances.

    Args:
        count_tokens: of a text.
        num_tokens: of the document, about.
        num_facts: hidden.
        num_absent: asked for and not hidden.
        num_pairs: of neighbours among the hidden facts, which can be far apart in the text.
        seed: of all that is drawn.

    Raises:
        ConfigError: if there are not so many facts, or not so much text.
    """
    rng = np.random.default_rng(seed)
    things = [(place, number) for place in PLACES for number in NUMBERS]
    if num_facts + num_absent > len(things) or num_facts < 1:
        raise ConfigError(f"--facts and --absent can be 1 to {len(things)} together.")
    order = rng.permutation(len(things))
    codes = rng.choice(range(1000, 10000), len(things), replace=False)
    drawn = order[: num_facts + num_absent].tolist()
    facts = [Fact(things[n][0], things[n][1], str(codes[n])) for n in drawn]
    hidden, absent = facts[:num_facts], facts[num_facts:]
    paragraphs = _paragraphs(count_tokens, num_tokens)
    if len(paragraphs) <= num_facts:
        raise ConfigError(f"--tokens {num_tokens} is too short for {num_facts} facts.")
    places = np.linspace(1, len(paragraphs) - 1, num_facts).astype(int)
    for place, fact in zip(places, hidden, strict=True):
        glue = " " if paragraphs[place][0].isalpha() else "\n\n"
        paragraphs[place] = f"{fact.sentence}{glue}{paragraphs[place]}"
    firsts = rng.permutation(num_facts)[: num_pairs * 2].tolist()
    return HiddenFacts(
        "\n\n".join(paragraphs),
        [AskedFacts(_question(fact), (fact.code,)) for fact in hidden],
        [AskedFacts(_question(fact), ()) for fact in absent],
        [
            AskedFacts(
                f"{_question(hidden[a])} {_question(hidden[b])}", (hidden[a].code, hidden[b].code)
            )
            for a, b in zip(firsts[::2], firsts[1::2], strict=False)
        ],
    )


def _question(fact: Fact) -> str:
    return f"What is the {fact.thing}?"


def _paragraphs(count_tokens: Callable[[str], int], num_tokens: int) -> list[str]:
    from pydoc_data.topics import topics

    text = "\n\n".join([DEFAULT_TEXT.read_text(encoding="utf-8"), *topics.values()])
    whole = [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
    low, high = 0, len(whole)
    while low < high:  # the fewest paragraphs that have so many tokens
        middle = (low + high) // 2
        if count_tokens("\n\n".join(whole[:middle])) < num_tokens:
            low = middle + 1
        else:
            high = middle
    if low == len(whole):
        raise ConfigError(f"--tokens {num_tokens}: there is not so much text.")
    return whole[:low]


def is_right(codes: Sequence[str], answer: str, found: bool) -> bool:
    """Whether an answer has all numbers that it should; none: whether nothing was found."""
    return all(code in answer for code in codes) if codes else not found
