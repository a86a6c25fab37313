"""Contexts with questions about them, in the style of RULER (arXiv 2404.06654).

Made of the words the tiny test models know (:mod:`retrieval_task`), so lengths are exact and an
answer is right or wrong:

    needle       a few facts in a long context of filler, one of which is asked for
    multi-key    facts wherever one looks, and a question for one of them
    multi-value  keys with three values each, far apart; ``all key`` wants them in order
    chain        variable tracking: ``k1 k2 .``, ``k2 k3 .``, ``k3 value .`` far apart and in any
                 order; ``chain k1`` wants ``k2 k3 value``
    most         aggregation: one filler word is more frequent than any other; ``most`` wants it
    copy         32 words of a passage, continued verbatim from four of its words

``multi-value``, ``chain`` and ``most`` are for models that were trained on them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_kvzip.evaluation.tasks.documents import Document, Question
from vllm_kvzip.evaluation.tasks.retrieval_task import (
    ALL,
    BASIC_VOCABULARY_SIZE,
    CHAIN,
    MOST,
    NUM_KEYS,
    VOCABULARY,
    Context,
    copy_prompt,
    filler_with_gaps,
    make_context,
    question_prompt,
    write_facts,
)

if TYPE_CHECKING:
    from collections.abc import Callable

COPY_TOKENS = 32
VALUES_PER_KEY = 3
HOPS = 3
NEEDLE_DENSITY = 0.1  # share of the tokens that belong to facts
FACT_DENSITY = 0.5
MOST_SHARE = 0.15  # of all tokens; any other filler word has about 0.01


def needle(rng: np.random.Generator, num_tokens: int, count: int) -> Document:
    """As few facts as the models have seen in training; a single one they seldom find."""
    context = make_context(rng, num_tokens, NEEDLE_DENSITY)
    return Document(context.tokens.tolist(), _fact_questions(rng, context, count))


def multi_key(rng: np.random.Generator, num_tokens: int, count: int) -> Document:
    """As many facts as there are keys."""
    context = make_context(rng, num_tokens, FACT_DENSITY)
    return Document(context.tokens.tolist(), _fact_questions(rng, context, count))


def multi_value(rng: np.random.Generator, num_tokens: int, count: int) -> Document:
    """Every key occurs three times, with another value each time."""
    num_keys = max(1, min(int(FACT_DENSITY * num_tokens / 3) // VALUES_PER_KEY, NUM_KEYS))
    tokens, starts = filler_with_gaps(rng, num_tokens, num_keys * VALUES_PER_KEY)
    keys = rng.choice(VOCABULARY.keys, num_keys, replace=False)
    values = np.stack([rng.choice(VOCABULARY.values, VALUES_PER_KEY, False) for _ in keys])
    owner = rng.permutation(np.repeat(np.arange(num_keys), VALUES_PER_KEY))
    nth = np.array([int((owner[:place] == who).sum()) for place, who in enumerate(owner)])
    write_facts(tokens, starts, keys[owner], values[owner, nth])
    asked = rng.permutation(num_keys)[:count]
    questions = [
        Question([VOCABULARY.ids[ALL], int(keys[who])], values[who].tolist()) for who in asked
    ]
    return Document(tokens.tolist(), questions)


def chain(rng: np.random.Generator, num_tokens: int, count: int) -> Document:
    """Keys whose value is another key, three hops to a value; the rest are plain facts."""
    num_facts = max(HOPS, min(int(FACT_DENSITY * num_tokens / 3), NUM_KEYS))
    tokens, starts = filler_with_gaps(rng, num_tokens, num_facts)
    keys = rng.choice(VOCABULARY.keys, num_facts, replace=False)
    values = rng.choice(VOCABULARY.values, num_facts)
    linked = keys[: max(1, num_facts // (2 * HOPS)) * HOPS].reshape(-1, HOPS)
    ends = values[: linked.size].reshape(-1, HOPS)
    ends[:, :-1] = linked[:, 1:]
    order = rng.permutation(num_facts)
    write_facts(tokens, starts, keys[order], values[order])
    questions = [
        Question([VOCABULARY.ids[CHAIN], int(linked[which, 0])], ends[which].tolist())
        for which in rng.permutation(len(linked))[:count]
    ]
    return Document(tokens.tolist(), questions)


def most(rng: np.random.Generator, num_tokens: int, count: int) -> Document:
    """Filler in which one word stands out; there is only one question to ask."""
    tokens = rng.choice(VOCABULARY.filler, num_tokens)
    word = rng.choice(VOCABULARY.filler)
    tokens[rng.permutation(num_tokens)[: max(3, int(MOST_SHARE * num_tokens))]] = word
    return Document(tokens.tolist(), [Question([VOCABULARY.ids[MOST]], [int(word)])][:count])


def copy(rng: np.random.Generator, num_tokens: int, count: int) -> Document:
    """Continue passages from anywhere in the context."""
    context = make_context(rng, num_tokens)
    questions = []
    for offset in rng.integers(num_tokens - COPY_TOKENS - 4, size=count).tolist():
        prompt, answer = copy_prompt(context, offset, num_answer_tokens=COPY_TOKENS)
        questions.append(Question(prompt[num_tokens:], answer))
    return Document(context.tokens.tolist(), questions)


TASKS: dict[str, Callable[[np.random.Generator, int, int], Document]] = {
    "needle": needle,
    "multi-key": multi_key,
    "multi-value": multi_value,
    "chain": chain,
    "most": most,
    "copy": copy,
}
EXTRA_TASKS = ("multi-value", "chain", "most")


def known_tasks(vocabulary_size: int) -> list[str]:
    """Tasks whose words a model with so many words knows."""
    return [
        name for name in TASKS if name not in EXTRA_TASKS or vocabulary_size > BASIC_VOCABULARY_SIZE
    ]


def _fact_questions(rng: np.random.Generator, context: Context, count: int) -> list[Question]:
    """``? key`` for some of the facts."""
    keys = rng.permutation(list(context.facts))[:count].tolist()
    asked = [question_prompt(context, key) for key in keys]
    return [Question(prompt[len(context.tokens) :], [value]) for prompt, value in asked]
