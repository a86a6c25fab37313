"""Contexts and questions of both task families: words of the tiny models, and running text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_kvzip.errors import ConfigError
from vllm_kvzip.evaluation.tasks.documents import Document
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY
from vllm_kvzip.evaluation.tasks.text_frame import TextFrame
from vllm_kvzip.evaluation.tasks.text_source import load_text
from vllm_kvzip.evaluation.tasks.text_tasks import TEXT_TASKS
from vllm_kvzip.evaluation.tasks.text_weaving import Weaver
from vllm_kvzip.evaluation.tasks.word_tasks import TASKS, known_tasks

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Callable, Sequence

    Make = Callable[[np.random.Generator, int, int], Document]

DEFAULT_WORD_TASKS = ("needle", "multi-key")
DEFAULT_TEXT_TASKS = ("facts", "cloze", "open")
ANSWERED_TEXT_TASKS = ("facts", "cloze")  # what "open" asks has no right answer
WORD_QUESTIONS, TEXT_QUESTIONS = 24, 3
ALL_TASKS = (*TASKS, *TEXT_TASKS)


def knows_words_only(vocabulary_size: int) -> bool:
    """Whether it is one of the tiny test models, which know no language."""
    return vocabulary_size <= len(VOCABULARY.words)


def default_tasks(vocabulary_size: int, *, answered: bool = False) -> tuple[str, ...]:
    """What a model with so many words is asked where nobody says what.

    Args:
        vocabulary_size: of the model.
        answered: only tasks that have right answers.
    """
    if knows_words_only(vocabulary_size):
        return DEFAULT_WORD_TASKS
    return ANSWERED_TEXT_TASKS if answered else DEFAULT_TEXT_TASKS


def check_tasks(tasks: Sequence[str], vocabulary_size: int) -> None:
    """Refuse tasks of the other family.

    Raises:
        ConfigError: if the model does not know the words of a task.
    """
    fitting = list(TEXT_TASKS)
    if knows_words_only(vocabulary_size):
        fitting = known_tasks(vocabulary_size)
    for task in tasks:
        if task not in fitting:
            raise ConfigError(
                f"--tasks {task}: the model does not know the words of that task; it can be asked "
                f"{', '.join(fitting)}."
            )


def settle_tasks(args: Namespace, vocabulary_size: int, *, answered: bool = False) -> None:
    """Check ``args.tasks`` and set what is None, also ``args.questions``, to what suits the model.

    Args:
        args: of a script.
        vocabulary_size: of the model.
        answered: see :func:`default_tasks`.

    Raises:
        ConfigError: see :func:`check_tasks`.
    """
    args.tasks = args.tasks or list(default_tasks(vocabulary_size, answered=answered))
    check_tasks(args.tasks, vocabulary_size)
    if args.questions is None:
        is_words = knows_words_only(vocabulary_size)
        args.questions = WORD_QUESTIONS if is_words else TEXT_QUESTIONS


def make_documents(
    model: str,
    tasks: Sequence[str],
    *,
    num_contexts: int,
    context_tokens: int,
    questions: int,
    seed: int = 0,
    text: Sequence[str] | None = None,
    is_query_aware: bool = False,
) -> list[tuple[str, Document]]:
    """Task names and contexts with their questions.

    A query-aware context has one question, which it also ends with.

    Args:
        model: folder with the tokenizer; read for tasks of running text only.
        tasks: of one or both families.
        num_contexts: of each task.
        context_tokens: exact length of a context; of a query-aware one of running text, without
            its question.
        questions: about each context, where it has so many.
        seed: same seed, same documents.
        text: see :func:`text_source.load_text`.
        is_query_aware: see above.

    Raises:
        ConfigError: if the text is too short or cannot be read.
    """
    rng = np.random.default_rng(seed)
    weaver = None
    if set(tasks) & set(TEXT_TASKS):
        weaver = _weaver(model, text, context_tokens)
    documents = []
    for task in tasks:
        make = _maker(task, weaver)
        length = context_tokens
        if is_query_aware and task in TASKS:
            length -= len(make(np.random.default_rng(0), 128, 1).questions[0].tokens)
        for _ in range(num_contexts):
            document = make(rng, length, questions)
            if not document.questions:
                raise ConfigError(
                    f"--tasks {task}: a context has no question; name more text or raise "
                    f"--context-tokens."
                )
            if not is_query_aware:
                documents.append((task, document))
                continue
            for question in document.questions:
                seen = Document([*document.tokens, *question.asked], [question])
                documents.append((task, seen))
    return documents


def _weaver(model: str, text: Sequence[str] | None, context_tokens: int) -> Weaver:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model {model} has no tokenizer that can be read: {error}") from error
    frame = TextFrame.of(tokenizer)
    return Weaver(load_text(text, context_tokens, frame), frame)


def _maker(task: str, weaver: Weaver | None) -> Make:
    if task in TASKS:
        return TASKS[task]
    assert weaver is not None
    bound, make = weaver, TEXT_TASKS[task]
    return lambda rng, num_tokens, count: make(bound, rng, num_tokens, count)
