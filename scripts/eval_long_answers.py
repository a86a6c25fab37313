"""What does a decode budget cost a long answer? By scorer, mode and budget; any chat model.

    python scripts/eval_long_answers.py --model MODEL
    python scripts/eval_long_answers.py --model MODEL --tokens 4096 --budgets 2048 1024 512 256
    python scripts/eval_long_answers.py --model MODEL --scorers default --modes evict mixed quantize
    python scripts/eval_long_answers.py --model MODEL --tasks variables lists story

Without compression the model writes an answer to each prompt, sampled at temperature 1. Then it is
led through that answer once for each scorer and budget, token by token, in real decode steps of a
real engine, which compresses what the request holds whenever its budget is full. Each cell says how
far the next token's distribution is from the uncompressed model's, in nats a token, behind the
first round, when something has been evicted; and the most KV blocks a request held. Brackets are
the lowest and the highest answer. All answers and budgets of a scorer run side by side in one
engine; which share of its time the rounds took stands beside the scorer's name.

A budget is so many bytes: in modes ``mixed`` and ``quantize`` as many more pairs are kept as fit.

With ``--tasks`` it is led through answers whose last lines repeat what their first lines said, as
if it had written them (``evaluation/tasks/answer_tasks.py``). A cell then says how unlikely the
repeated tokens were, in nats a token; without compression, and where the model has not seen the
first lines at all, they stand in the first rows.

Scorer ``streaming`` keeps the first and the last tokens (recency), ``random`` is a control.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"})

from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from vllm_kvzip.errors import KVzipError
from vllm_kvzip.evaluation.engines import BLOCK_SIZE, versions
from vllm_kvzip.evaluation.leading import Follower, lead
from vllm_kvzip.evaluation.quality.lessons import Lesson
from vllm_kvzip.evaluation.quality.rows import settings_of
from vllm_kvzip.evaluation.tasks.answer_tasks import ANSWER_TASKS, make_answer
from vllm_kvzip.evaluation.tasks.text_frame import TextFrame

if TYPE_CHECKING:
    from collections.abc import Sequence

PROMPTS = (
    "Write a long story about a lighthouse keeper who finds a letter. Use many names and places.",
    "Explain step by step how bread is made, and write down every ingredient with its weight.",
    "Tell the history of a small invented town, year by year, with the people who lived there.",
    "Write a long dialogue between a teacher and a student about how rivers shape the land.",
)
SEED = 7


class OwnAnswers:
    """Prompts and the uncompressed model's answers to them.

    Args:
        model: its folder.
        frame: what stands around a prompt.
        num_prompts: how many of ``PROMPTS``.
        num_tokens: of each answer.

    Attributes:
        kinds: the tables' rows of a scorer.
    """

    def __init__(self, model: str, frame: TextFrame, num_prompts: int, num_tokens: int) -> None:
        self.kinds = ["nats a token"]
        self._model = model
        self._own = [
            Follower(
                [*frame.head_ids, *frame.ids(prompt + frame.before_answer)],
                Lesson(length=num_tokens, keeps_distributions=True),
                temperature=1.0,
                seed=SEED + number,
            )
            for number, prompt in enumerate(PROMPTS[:num_prompts])
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(len(one.prompt) + one.lesson.length for one in self._own)

    def write(self) -> list[tuple[str, list[list[float]]]]:
        """Let the model answer without compression; rows for the head of the table: none."""
        lead(self._model, None, self._own)
        return []

    def followers(self, budget: int) -> list[Follower]:
        """Requests that are led through the answers."""
        return [
            Follower(
                one.prompt, Lesson(one.lesson.output, reference=one.lesson.distributions), budget
            )
            for one in self._own
        ]

    def found(self, followers: Sequence[Follower], budget: int) -> list[list[float]]:
        """Mean nats a token behind the first round, by kind and answer."""
        blocks = budget // BLOCK_SIZE
        filled = (blocks + max(1, blocks // 2)) * BLOCK_SIZE
        return [
            [
                statistics.fmean(
                    nats
                    for at, nats in one.lesson.divergences.items()
                    if at + len(one.prompt) > filled
                )
                for one in followers
            ]
        ]


class TaskAnswers:
    """Answers that a model is led through, the same ones for everybody.

    Args:
        model: its folder.
        frame: its tokenizer.
        tasks: of ``ANSWER_TASKS``.
        num_answers: of each task.
        num_tokens: of each answer.

    Attributes:
        kinds: the tables' rows of a scorer.
    """

    def __init__(
        self,
        model: str,
        frame: TextFrame,
        tasks: Sequence[str],
        num_answers: int,
        num_tokens: int,
    ) -> None:
        self.kinds = list(tasks)
        self._model = model
        self._num_answers = num_answers
        self._answers = [
            make_answer(task, frame, np.random.default_rng([SEED, number]), num_tokens)
            for task in tasks
            for number in range(num_answers)
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(len(answer.prompt) + len(answer.tokens) for answer in self._answers)

    def write(self) -> list[tuple[str, list[list[float]]]]:
        """What the uncompressed model says, and what it says without the first lines."""
        whole = self.followers(None)
        cut = [
            Follower(answer.prompt, Lesson(answer.tokens[answer.num_fact_tokens :]))
            for answer in self._answers
        ]
        lead(self._model, None, [*whole, *cut])
        for one, answer in zip(cut, self._answers, strict=True):
            likelihoods = one.lesson.log_likelihoods
            one.lesson.log_likelihoods = {
                place + answer.num_fact_tokens: nats for place, nats in likelihoods.items()
            }
        return [
            ("uncompressed", self.found(whole)),
            ("without the first lines", self.found(cut)),
        ]

    def followers(self, budget: int | None) -> list[Follower]:
        """Requests that are led through the answers."""
        return [Follower(one.prompt, Lesson(one.tokens), budget) for one in self._answers]

    def found(self, followers: Sequence[Follower], _budget: int = 0) -> list[list[float]]:
        """Mean nats of a token that repeats something, by task and answer."""
        found = [
            -statistics.fmean(one.lesson.log_likelihoods[place] for place in answer.scored)
            for one, answer in zip(followers, self._answers, strict=True)
        ]
        count = self._num_answers
        return [found[first : first + count] for first in range(0, len(found), count)]


def cell(found: Sequence[float], most_blocks: int = 0) -> str:
    """Mean, lowest and highest of some answers, and the most blocks that one held."""
    text = f"{statistics.fmean(found):.3f} [{min(found):.3f} {max(found):.3f}]"
    return f"{text}, {most_blocks} blocks" if most_blocks else text


def measure(
    model: str, answers: OwnAnswers | TaskAnswers, settings: dict[str, Any], budgets: Sequence[int]
) -> tuple[list[list[str]], float]:
    """Cells of one scorer, by kind and budget, and the rounds' share of the time."""
    by_budget = {budget: answers.followers(budget) for budget in budgets}
    share = lead(model, settings, [one for group in by_budget.values() for one in group])
    columns = []
    for budget, group in by_budget.items():
        most = max(one.most_blocks for one in group)
        columns.append([cell(found, most) for found in answers.found(group, budget)])
    return [list(row) for row in zip(*columns, strict=True)], share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--scorers", nargs="+", default=["default", "keydiff", "streaming", "random"]
    )
    parser.add_argument(
        "--modes", nargs="+", default=["evict"], choices=("evict", "mixed", "quantize")
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[1024, 512, 256], help="tokens")
    parser.add_argument("--tokens", type=int, default=2048, help="of each answer")
    parser.add_argument("--prompts", type=int, default=2, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--tasks", nargs="+", choices=ANSWER_TASKS, help="forced answers instead")
    parser.add_argument("--answers", type=int, default=1, help="of each of --tasks")
    args = parser.parse_args()
    frame = TextFrame.of(AutoTokenizer.from_pretrained(args.model))
    answers: OwnAnswers | TaskAnswers
    if args.tasks:
        answers = TaskAnswers(args.model, frame, args.tasks, args.answers, args.tokens)
    else:
        answers = OwnAnswers(args.model, frame, args.prompts, args.tokens)
    if answers.longest <= 2 * max(args.budgets):
        parser.error("--tokens must be at least twice the largest of --budgets.")
    table = Table("scorer, mode", "", *(f"budget {budget}" for budget in args.budgets))
    for name, kinds in answers.write():
        for kind, found in zip(answers.kinds, kinds, strict=True):
            table.add_row(name, kind, *[cell(found)] * len(args.budgets))
            print(f"{name}, {kind}: {cell(found)}", file=sys.stderr, flush=True)
    for scorer, mode in product(args.scorers, args.modes):
        settings = {**settings_of(scorer, 1.0), "mode": mode}
        settings.pop("min_prompt_tokens")
        try:
            rows, share = measure(args.model, answers, settings, args.budgets)
        except (KVzipError, RuntimeError) as error:
            sys.exit(f"{scorer}, {mode}: {error}")
        for kind, row in zip(answers.kinds, rows, strict=True):
            table.add_row(f"{scorer}, {mode} ({share:.1%})", kind, *row)
            print(
                f"{scorer}, {mode}, {kind}: {'; '.join(row)}; {share:.1%}",
                file=sys.stderr,
                flush=True,
            )
    Console(width=160).print(table)
    blocks = -(-answers.longest // BLOCK_SIZE)
    what = "of answers that were given" if args.tasks else "of answers that the model wrote itself"
    print(
        f"{args.tokens} tokens {what}, {blocks} blocks of {BLOCK_SIZE} tokens uncompressed. "
        f"{versions()}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
