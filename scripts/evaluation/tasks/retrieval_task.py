"""Synthetic contexts with facts to retrieve: what the tiny test model was trained on.

A context is a run of words: facts ``key value .`` scattered among filler. Two kinds of prompt ask
for what it holds::

    question   <context> ? key                      -> value .
    copy       <context> repeat a b c d             -> what follows ``a b c d`` in the context

Every word is one token, so lengths are exact. A copy wraps around at the end of the context. More
kinds of question, which need three more words, are in ``word_tasks.py``. Needs numpy only;
imported by the training, profiling and evaluation scripts and by the tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SPECIAL_WORDS = ("<pad>", "<bos>", "<eos>", "<unk>")
PERIOD, QUESTION, REPEAT = ".", "?", "repeat"
ALL, CHAIN, MOST = "all", "chain", "most"
EXTRA_WORDS = (ALL, CHAIN, MOST)  # behind the others, so that models without them keep their ids
NUM_KEYS, NUM_VALUES, BASIC_VOCABULARY_SIZE = 200, 192, 512

Words = NDArray[np.int64]


class Vocabulary:
    """The words and their ids; id ``i`` is ``words[i]``."""

    def __init__(self) -> None:
        marks = [*SPECIAL_WORDS, PERIOD, QUESTION, REPEAT]
        keys = [f"k{index}" for index in range(NUM_KEYS)]
        values = [f"v{index}" for index in range(NUM_VALUES)]
        num_filler = BASIC_VOCABULARY_SIZE - len(marks) - len(keys) - len(values)
        filler = [f"w{index}" for index in range(num_filler)]
        self.words = [*marks, *keys, *values, *filler, *EXTRA_WORDS]
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.keys = np.arange(len(marks), len(marks) + NUM_KEYS)
        self.values = self.keys[-1] + 1 + np.arange(NUM_VALUES)
        self.filler = self.values[-1] + 1 + np.arange(num_filler)

    def text(self, ids: Words | list[int]) -> str:
        """Words joined by blanks, the form the tokenizer splits again."""
        return " ".join(self.words[index] for index in ids)


VOCABULARY = Vocabulary()


@dataclass(frozen=True)
class Context:
    """A context and its facts.

    Attributes:
        tokens: int64 ``[num_tokens]``.
        facts: key id -> value id; every key occurs once.
    """

    tokens: Words
    facts: dict[int, int]

    @property
    def text(self) -> str:
        """The context as words."""
        return VOCABULARY.text(self.tokens)


def make_context(
    rng: np.random.Generator, num_tokens: int, fact_density: float | None = None
) -> Context:
    """Scatter facts among filler.

    Args:
        rng: source of randomness.
        num_tokens: exact length in tokens, at least 3.
        fact_density: share of the tokens that belong to facts, in [0, 1]; drawn from 0.1 to 0.95
            when None. There are never more facts than keys, and always one.
    """
    density = rng.uniform(0.1, 0.95) if fact_density is None else fact_density
    num_facts = max(1, min(int(density * num_tokens / 3), NUM_KEYS, num_tokens // 3))
    tokens, starts = filler_with_gaps(rng, num_tokens, num_facts)
    keys = rng.choice(VOCABULARY.keys, num_facts, replace=False)
    values = rng.choice(VOCABULARY.values, num_facts)
    write_facts(tokens, starts, keys, values)
    return Context(tokens, dict(zip(keys.tolist(), values.tolist(), strict=True)))


def filler_with_gaps(
    rng: np.random.Generator, num_tokens: int, num_facts: int
) -> tuple[Words, Words]:
    """Filler, and positions where a fact of three tokens fits; no two overlap.

    Returns:
        int64 ``[num_tokens]`` and, ascending, int64 ``[num_facts]``.
    """
    num_units = num_facts + (num_tokens - 3 * num_facts)
    is_fact = np.zeros(num_units, dtype=bool)
    is_fact[rng.choice(num_units, num_facts, replace=False)] = True
    lengths = np.where(is_fact, 3, 1)
    starts = (np.cumsum(lengths) - lengths)[is_fact]
    return _filler_walk(rng, num_tokens), starts


def write_facts(tokens: Words, starts: Words, keys: Words, values: Words) -> None:
    """Put ``key value .`` at each start, in place."""
    tokens[starts] = keys
    tokens[starts + 1] = values
    tokens[starts + 2] = VOCABULARY.ids[PERIOD]


def _filler_walk(rng: np.random.Generator, num_tokens: int) -> Words:
    """Filler in which no pair of neighbours occurs twice while enough pairs are left.

    In natural text a few words tell a passage from all others; random words of a small vocabulary
    would repeat so many pairs that nobody could tell where a passage goes on.
    """
    num_words = len(VOCABULARY.filler)
    words = rng.integers(num_words, size=num_tokens)
    for _ in range(20):
        pairs = words[:-1] * num_words + words[1:]
        _, first = np.unique(pairs, return_index=True)
        repeated = np.setdiff1d(np.arange(num_tokens - 1), first) + 1
        if len(repeated) == 0:
            break
        words[repeated] = rng.integers(num_words, size=len(repeated))
    walk: Words = VOCABULARY.filler[words]
    return walk


def question_prompt(context: Context, key: int) -> tuple[list[int], int]:
    """``<context> ? key``, and the value that answers it (token ids)."""
    return [*context.tokens.tolist(), VOCABULARY.ids[QUESTION], key], context.facts[key]


def copy_prompt(
    context: Context, offset: int, num_hint_tokens: int = 4, num_answer_tokens: int = 128
) -> tuple[list[int], list[int]]:
    """``<context> repeat`` plus the tokens at ``offset``, and the tokens that continue them.

    Args:
        context: what is to be copied.
        offset: position of the first hint token.
        num_hint_tokens: how many tokens of the context follow ``repeat``.
        num_answer_tokens: length of the expected continuation.
    """
    rotated = np.roll(context.tokens, -offset).tolist()
    prompt = [*context.tokens.tolist(), VOCABULARY.ids[REPEAT], *rotated[:num_hint_tokens]]
    continuation = rotated[num_hint_tokens:] + rotated
    return prompt, continuation[:num_answer_tokens]
