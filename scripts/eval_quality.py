"""What can still be answered from a compressed context? Accuracy by scorer, budget and keep ratio.

    python scripts/eval_quality.py --model tests/models/tiny-retriever
    python scripts/eval_quality.py --model tests/models/tiny-retriever --scorers kvzip \\
        --modes evict quantize mixed --keep-bytes-ratios 0.5 0.25 0.125 0.0625

The context is compressed before any question is read (query-agnostic): each context is sent alone,
then all questions about it start from its compressed prefix, and the run fails unless each of them
did. With ``--query-aware`` each question also ends the context that is compressed, so the scorer
has seen it, and is then asked again. Tasks are made of the words the tiny test models know, see
``quality_tasks.py``.

With ``--keep-bytes-ratios`` rows are compared by bytes: every cell, the plot and the JSON say what
the contexts' blocks came down to by the engine's own count, which is not quite what was asked for.
The cache is bfloat16 then, because 4 bits save twice as much of a float32 one.

Real vLLM, one engine per row; requests name their keep ratio. Prints accuracy with a 95 % interval
in which the answers about one context count as a cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from evaluation import accuracy_table, cell, draw, versions
from local_server import CPU_ENVIRONMENT
from quality_run import measure
from quality_tasks import TASKS, Document, known_tasks
from rich.console import Console
from tqdm import tqdm

from vllm_kvzip.config import FormatName, Mode
from vllm_kvzip.errors import KVzipError
from vllm_kvzip.scoring import scorer_class

if TYPE_CHECKING:
    from collections.abc import Sequence

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
NO_COMPRESSION = "no compression"
ALL_PAIRS = "all"  # key of the cells that evict nothing, in place of a ratio


@dataclass(frozen=True)
class Row:
    """A row of the table: a scorer in a mode.

    Attributes:
        scorer: see :func:`settings_of`.
        mode: what becomes of the rest.
        formats: of quantized keys and values, ``nf4`` or ``int8+nf4``; "" for the default.
        full_share: of mode ``mixed``; None for the default.
        evicts: False for mode ``quantize`` with every KV pair in it, where no scorer matters.
    """

    scorer: str
    mode: Mode = "evict"
    formats: str = ""
    full_share: float | None = None
    evicts: bool = True

    @property
    def name(self) -> str:
        """As it stands in the table."""
        quantized = f"{self.mode} {self.formats}".strip()
        if not self.evicts:
            return f"{quantized}, nothing evicted"
        share = "" if self.full_share is None else f", {self.full_share:g} full"
        return f"{self.scorer}, {quantized}{share}"

    def settings(self, ratio: float, by_bytes: bool) -> dict[str, Any]:
        """The plugin's settings for this row.

        Args:
            ratio: kept / all, of KV pairs.
            by_bytes: of bytes instead.
        """
        settings = settings_of(self.scorer, ratio if self.evicts else 1.0)
        if by_bytes and self.evicts:
            settings["keep_bytes_ratio"] = settings.pop("keep_ratio")
        if self.mode == "evict":
            return settings
        settings["mode"] = self.mode
        if self.formats:
            keys, _, values = self.formats.partition("+")
            settings |= {"key_format": keys, "value_format": values or keys}
        if self.full_share is not None:
            settings["full_share"] = self.full_share
        return settings


def make_rows(
    scorers: Sequence[str],
    modes: Sequence[Mode],
    formats: Sequence[str],
    full_shares: Sequence[float | None],
) -> list[Row]:
    """Every scorer in every mode, and mode ``quantize`` without eviction first, if it is asked for.

    Args:
        scorers, modes: see :class:`Row`.
        formats: of the modes that quantize.
        full_shares: of mode ``mixed``.
    """
    rows = []
    if "quantize" in modes:
        rows += [Row("default", "quantize", each, evicts=False) for each in formats]
    for scorer, mode in product(scorers, modes):
        quantized = formats if mode != "evict" else [""]
        shares = full_shares if mode == "mixed" else [None]
        rows += [Row(scorer, mode, each, share) for each, share in product(quantized, shares)]
    return rows


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


def formats(text: str) -> str:
    """One format's name, or those of keys and values with a plus between.

    Raises:
        argparse.ArgumentTypeError: for another name.
    """
    names = text.split("+")
    if len(names) > 2 or not set(names) <= set(get_args(FormatName)):
        known = ", ".join(get_args(FormatName))
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}, nor two of them with a +")
    return text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="of scripts/train_tiny_model.py")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["needle", "multi-key"])
    parser.add_argument("--scorers", nargs="+", help="instead of a selection; may be default")
    parser.add_argument("--budgets", nargs="+", default=[""], help="default: what suits the scorer")
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument(
        "--keep-bytes-ratios", nargs="+", type=float, help="bytes kept / all, instead"
    )
    parser.add_argument("--modes", nargs="+", choices=get_args(Mode), default=["evict"])
    parser.add_argument(
        "--formats",
        nargs="+",
        type=formats,
        default=[""],
        help="of what is quantized: nf4, int4, int8, or keys+values such as int8+nf4",
    )
    parser.add_argument("--full-shares", nargs="+", type=float, default=[None], help="mode mixed")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="default float32; by bytes bfloat16"
    )
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
    args.dtype = args.dtype or ("float32" if args.keep_bytes_ratios is None else "bfloat16")
    return args


def main() -> None:
    args = parse_args()
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})
    scorers = list(ROWS)
    if args.scorers:
        scorers = [f"{s}+{b}" if b else s for s in args.scorers for b in args.budgets]
    by_bytes = args.keep_bytes_ratios is not None
    by_mode = by_bytes or args.modes != ["evict"]
    ratios = args.keep_bytes_ratios if by_bytes else args.keep_ratios
    named = make_documents(args)
    documents = [document for _, document in named]
    rows: list[Row | None] = [None]
    rows += make_rows(scorers, args.modes, args.formats, args.full_shares)
    groups = {task: [t == task for t, _ in named] for task in args.tasks}
    groups = {"all tasks": [True] * len(named), **groups} if len(groups) > 1 else groups
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in groups}
    bar = tqdm(rows, desc="engines")
    for row in bar:
        name = NO_COMPRESSION if row is None else row.name if by_mode else row.scorer
        bar.set_postfix_str(name)
        asked = ratios if row is not None and row.evicts else [1.0]
        settings = None if row is None else row.settings(max(asked), by_bytes)
        if settings is not None and args.prefill_budget is not None:
            settings["prefill_budget"] = args.prefill_budget
        try:
            measured = measure(
                args.model,
                documents,
                settings,
                asked,
                num_ranks=args.tensor_parallel_size,
                dtype=args.dtype,
            )
        except KVzipError as error:
            sys.exit(f"\n{name}: {error}")
        keys = [f"{ratio:g}" for ratio in asked]
        if row is None or not row.evicts:
            keys = [ALL_PAIRS] if by_mode else [f"{ratio:g}" for ratio in ratios]
            measured *= len(keys)
        for group, members in groups.items():
            for key, found in zip(keys, measured, strict=True):
                chosen = [c for c, member in zip(found.counts, members, strict=True) if member]
                shown = cell(chosen, found.held if by_mode else None)
                results[group].setdefault(name, {})[key] = shown
    columns = {ALL_PAIRS: "all KV pairs"} if by_mode else {}
    columns |= {f"{ratio:g}": f"{'bytes' if by_bytes else 'keep'} {ratio:g}" for ratio in ratios}
    console = Console(width=140 if by_mode else 118)  # five columns, with what is held
    about = "query-aware" if args.query_aware else "query-agnostic"
    if args.prefill_budget is not None:
        about += f", prefill budget {args.prefill_budget}"
    if args.tensor_parallel_size > 1:
        about += f", {args.tensor_parallel_size} ranks"
    about += f", {args.dtype}" if args.dtype != "float32" else ""
    for group, members in groups.items():
        own = [d for d, member in zip(documents, members, strict=True) if member]
        questions = sum(len(document.questions) for document in own)
        title = f"{group}: {questions} questions, {about}, contexts of {args.context_tokens}"
        console.print(accuracy_table(title, columns, results[group]))
    console.print(versions())
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), **results}, indent=2) + "\n")
    if args.plot:
        draw(args.plot, next(iter(results.values())))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
