"""What can still be answered from a compressed context? Accuracy by scorer, budget and keep ratio.

    python scripts/eval_quality.py --model tests/models/tiny-retriever

The context is compressed before any question is read (query-agnostic): each context is sent alone,
then all questions about it start from its compressed prefix, and the run fails unless each of them
did. With ``--query-aware`` each question also ends the context that is compressed, so the scorer
has seen it, and is then asked again. Tasks are made of the words the tiny test models know, see
``quality_tasks.py``.

Real vLLM, one engine per row and keep ratio. Prints accuracy with a 95 % interval in which the
answers about one context count as a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import accuracy_table, cell, counter, draw, start_engine, versions
from local_server import CPU_ENVIRONMENT
from quality_tasks import TASKS, Document, known_tasks
from rich.console import Console
from tqdm import tqdm

from vllm_kvzip.errors import KVzipError
from vllm_kvzip.scoring import scorer_class

ROWS = (
    "default",
    "kvzip",
    "kvzip+adaptive-per-layer",
    "kvzip+uniform",
    "surrogate",
    "keydiff",
    "expected-attention",
    "window",
    "streaming",
    "random",
)
KEEP_RATIOS = (0.5, 0.3, 0.2, 0.1)


def settings_of(row: str, keep_ratio: float) -> dict[str, Any]:
    """The plugin's settings: ``default``, or a scorer with its own budget or a named one.

    A scorer of which only the name is given must do without the head profile's budgets.
    """
    settings: dict[str, Any] = {"keep_ratio": keep_ratio, "min_prompt_tokens": 0}
    if row == "default":
        return settings
    scorer, _, budget = row.partition("+")
    return {
        **settings,
        "scorer": scorer,
        "budget": budget or scorer_class(scorer).default_budget or "adaptive",
    }


def make_documents(args: argparse.Namespace) -> list[tuple[str, Document]]:
    """Task names and contexts with their questions.

    A query-aware context has one question, which it also ends with.
    """
    rng = np.random.default_rng(args.seed)
    documents = []
    for task in args.tasks:
        make = TASKS[task]
        length = len(make(np.random.default_rng(0), 128, 1).questions[0].tokens)
        for _ in range(args.num_contexts):
            if not args.query_aware:
                documents.append((task, make(rng, args.context_tokens, args.questions)))
                continue
            document = make(rng, args.context_tokens - length, args.questions)
            for question in document.questions:
                seen = Document([*document.tokens, *question.tokens], [question])
                documents.append((task, seen))
    return documents


def measure(
    model: str, documents: list[Document], settings: dict[str, Any] | None, num_ranks: int = 1
) -> list[tuple[int, int]]:
    """Right tokens and all tokens of the answers about each document, in an engine of its own.

    Raises:
        RuntimeError: if a question did not start from a compressed context.
    """
    from vllm import SamplingParams

    def sampling(num_tokens: int, context: int) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True,
            extra_args={"kvzip_context_tokens": context},
        )  # fmt: skip

    def prompt(number: int, tokens: list[int]) -> dict[str, Any]:
        # Contexts that differ in their last words only would share raw blocks, and a scorer that
        # watches the last queries would not see them.
        return {"prompt_token_ids": tokens, "cache_salt": str(number)}

    llm = start_engine(model, settings, num_ranks)
    lengths = [len(document.tokens) for document in documents]
    before = counter("prefix_hits_total")
    if settings is not None:
        contexts = [prompt(number, document.tokens) for number, document in enumerate(documents)]
        llm.generate(contexts, [sampling(2, n) for n in lengths], use_tqdm=False)
    prompts, limits, answers = [], [], []
    for number, document in enumerate(documents):
        for question in document.questions:
            prompts.append(prompt(number, [*document.tokens, *question.tokens]))
            limits.append(sampling(len(question.answer), lengths[number]))
            answers.append(question.answer)
    results = iter(llm.generate(prompts, limits, use_tqdm=False))
    llm.llm_engine.engine_core.shutdown()
    if settings is not None and counter("prefix_hits_total") - before != len(prompts):
        raise RuntimeError(f"not every question started from a compressed context: {settings}")
    counts = []
    for document in documents:
        right = total = 0
        for question in document.questions:
            output = next(results).outputs[0].token_ids
            right += sum(a == b for a, b in zip(output, question.answer, strict=True))
            total += len(question.answer)
        counts.append((right, total))
    return counts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="of scripts/train_tiny_model.py")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["needle", "multi-key"])
    parser.add_argument("--scorers", nargs="+", help="instead of a selection; may be default")
    parser.add_argument("--budgets", nargs="+", default=[""], help="default: what suits the scorer")
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument("--query-aware", action="store_true", help="the scorer sees the question")
    parser.add_argument("--prefill-budget", type=int, help="tokens; compress while reading")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks share the heads")
    parser.add_argument("--num-contexts", type=int, default=12, help="of each task")
    parser.add_argument(
        "--questions", type=int, default=24, help="per context, where it has so many"
    )
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG; needs matplotlib")
    args = parser.parse_args()
    try:
        vocabulary_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError):
        parser.error(f"--model {args.model} is no folder of a model with a config.json")
    if unknown := [task for task in args.tasks if task not in known_tasks(vocabulary_size)]:
        parser.error(f"--model {args.model} does not know the words of the task {unknown[0]}")
    return args


def main() -> None:
    args = parse_args()
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})
    rows = list(ROWS)
    if args.scorers:
        rows = [f"{s}+{b}" if b else s for s in args.scorers for b in args.budgets]
    named = make_documents(args)
    documents = [document for _, document in named]
    cells = [("no compression", ratio) for ratio in args.keep_ratios[:1]]
    cells += [(row, ratio) for row in rows for ratio in args.keep_ratios]
    groups = {task: [t == task for t, _ in named] for task in args.tasks}
    groups = {"all tasks": [True] * len(named), **groups} if len(groups) > 1 else groups
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in groups}
    bar = tqdm(cells, desc="engines")
    for row, ratio in bar:
        bar.set_postfix_str(f"{row}, keep ratio {ratio:g}")
        settings = None if row == "no compression" else settings_of(row, ratio)
        if settings is not None and args.prefill_budget is not None:
            settings["prefill_budget"] = args.prefill_budget
        try:
            counts = measure(args.model, documents, settings, args.tensor_parallel_size)
        except KVzipError as error:
            sys.exit(f"\n{row}: {error}")
        for name, members in groups.items():
            chosen = [c for c, member in zip(counts, members, strict=True) if member]
            for key in [ratio] if settings else args.keep_ratios:
                results[name].setdefault(row, {})[f"{key:g}"] = cell(chosen)
    console = Console(width=118)
    about = "query-aware" if args.query_aware else "query-agnostic"
    if args.prefill_budget is not None:
        about += f", prefill budget {args.prefill_budget}"
    if args.tensor_parallel_size > 1:
        about += f", {args.tensor_parallel_size} ranks"
    for name, members in groups.items():
        asked = [d for d, member in zip(documents, members, strict=True) if member]
        questions = sum(len(document.questions) for document in asked)
        title = f"{name}: {questions} questions, {about}, contexts of {args.context_tokens}"
        console.print(accuracy_table(title, args.keep_ratios, results[name]))
    console.print(versions())
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), **results}, indent=2) + "\n")
    if args.plot:
        draw(args.plot, next(iter(results.values())))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
