"""What does a decode budget cost a long answer? By scorer, mode and budget; any chat model.

    python scripts/eval_long_answers.py --model MODEL
    python scripts/eval_long_answers.py --model MODEL --tokens 4096 --budgets 2048 1024 512 256
    python scripts/eval_long_answers.py --model MODEL --scorers default --modes evict mixed quantize

Without compression the model writes an answer to each prompt, sampled at temperature 1. Then it is
led through that answer once for each scorer and budget, token by token, in real decode steps of a
real engine, which compresses what the request holds whenever its budget is full. Each cell says how
far the next token's distribution is from the uncompressed model's, in nats a token, behind the
first round, when something has been evicted; the most KV blocks a request held; and which share of
the time the rounds took. Brackets are the lowest and the highest answer.

A budget is so many bytes: in modes ``mixed`` and ``quantize`` as many more pairs are kept as fit.

Scorer ``streaming`` keeps the first and the last tokens (recency), ``random`` is a control.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

os.environ.update({"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"})

from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from vllm_kvzip.errors import KVzipError
from vllm_kvzip.evaluation.engines import BLOCK_SIZE, counter, start_engine, versions
from vllm_kvzip.evaluation.quality.lessons import Lesson
from vllm_kvzip.evaluation.quality.rows import settings_of
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


class LongAnswers:
    """Prompts and the uncompressed model's answers to them.

    Args:
        model: its folder.
        num_prompts: how many of ``PROMPTS``.
        num_tokens: of each answer.
    """

    def __init__(self, model: str, num_prompts: int, num_tokens: int) -> None:
        self._model, self._num_tokens = model, num_tokens
        frame = TextFrame.of(AutoTokenizer.from_pretrained(model))
        self._prompts = [
            [*frame.head_ids, *frame.ids(prompt + frame.before_answer)]
            for prompt in PROMPTS[:num_prompts]
        ]
        self._answers: list[Lesson] = []
        self._seconds = 0.0  # of the last run

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(map(len, self._prompts))

    def write(self) -> None:
        """Let the model answer without compression."""
        self._answers = [
            Lesson(length=self._num_tokens, keeps_distributions=True) for _ in self._prompts
        ]
        self._run(None, self._answers, temperature=1.0)

    def led(self, settings: dict[str, Any], budget: int) -> tuple[list[float], int, float]:
        """Lead the model through its answers.

        Args:
            settings: the plugin's.
            budget: the decode budget, tokens.

        Returns:
            mean nats a token behind the first round, by answer; the most blocks a request held; and
            seconds of rounds / all seconds.

        Raises:
            RuntimeError: if a request was not compressed.
        """
        lessons = [Lesson(own.output, reference=own.distributions) for own in self._answers]
        rounds, seconds = counter("decode_rounds_total"), round_seconds()
        most = self._run({**settings, "decode_budget": budget}, lessons, temperature=0.0)
        if counter("decode_rounds_total") - rounds < len(lessons):
            raise RuntimeError(f"with a budget of {budget} tokens not every answer had a round")
        blocks = budget // BLOCK_SIZE
        filled = (blocks + max(1, blocks // 2)) * BLOCK_SIZE
        found = [
            statistics.fmean(
                nats for at, nats in lesson.divergences.items() if at + len(prompt) > filled
            )
            for lesson, prompt in zip(lessons, self._prompts, strict=True)
        ]
        return found, most, (round_seconds() - seconds) / self._seconds

    def _run(
        self, settings: dict[str, Any] | None, lessons: Sequence[Lesson], temperature: float
    ) -> int:
        """Follow a lesson for each prompt in a fresh engine; the most blocks a request held."""
        from vllm_kvzip.evaluation.quality.teacher_forcing import TeacherForcing, forget, give
        from vllm_kvzip.vllm_bridge.symbols import SamplingParams

        longest = self.longest_prompt + self._num_tokens + 1
        llm = start_engine(
            self._model,
            settings,
            max_model_len=longest,
            max_num_seqs=len(lessons),
            logits_processors=[TeacherForcing],
            async_scheduling=False,
        )
        engine = llm.llm_engine
        for number, (prompt, lesson) in enumerate(zip(self._prompts, lessons, strict=True)):
            sampling = SamplingParams(
                temperature=temperature,
                seed=SEED + number,
                max_tokens=self._num_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=give(lesson),
            )
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        scheduler = engine.engine_core.engine_core.scheduler
        (rows,) = [
            m.req_to_blocks for m in scheduler.kv_cache_manager.coordinator.single_type_managers
        ]
        most = 0
        begin = time.perf_counter()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    lessons[int(output.request_id)].output = list(output.outputs[0].token_ids)
            held = [sum(not block.is_null for block in row) for row in rows.values()]
            most = max([most, *held])
        self._seconds = time.perf_counter() - begin
        forget()
        engine.engine_core.shutdown()
        del llm, engine, scheduler
        gc.collect()
        return most


def round_seconds() -> float:
    """What all rounds of this process's engines took."""
    stages = ("score", "select", "compact", "quantize")
    return sum(counter("compress_seconds_sum", stage=stage) for stage in stages)


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
    args = parser.parse_args()
    answers = LongAnswers(args.model, args.prompts, args.tokens)
    if answers.longest_prompt + args.tokens <= 2 * max(args.budgets):
        parser.error("--tokens must be at least twice the largest of --budgets.")
    answers.write()
    table = Table("scorer, mode", *(f"budget {budget}" for budget in args.budgets))
    rows = [(scorer, mode) for scorer in args.scorers for mode in args.modes]
    cells = {row: [", ".join(row)] for row in rows}
    for budget in args.budgets:
        for scorer, mode in rows:
            settings = {**settings_of(scorer, 1.0), "mode": mode}
            settings.pop("min_prompt_tokens")
            try:
                found, most, share = answers.led(settings, budget)
            except (KVzipError, RuntimeError) as error:
                sys.exit(f"{scorer}, {mode}: {error}")
            mean = statistics.fmean(found)
            cell = f"{mean:.3f} [{min(found):.3f} {max(found):.3f}], {most} blocks, {share:.1%}"
            cells[scorer, mode].append(cell)
            print(f"{scorer}, {mode}, budget {budget}: {cell}", file=sys.stderr, flush=True)
    for row in cells.values():
        table.add_row(*row)
    Console(width=120).print(table)
    blocks = -(-(answers.longest_prompt + args.tokens) // BLOCK_SIZE)
    print(
        f"Nats a token from the uncompressed model's distributions, along {args.prompts} answers "
        f"of {args.tokens} tokens that it wrote itself ({blocks} blocks of {BLOCK_SIZE} tokens). "
        f"{versions()}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
