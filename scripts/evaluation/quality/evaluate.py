"""What does compression cost a model's answers? By scorer, budget and keep ratio; any model.

    vllm-kvzip evaluate MODEL --max-loss 0.05
    vllm-kvzip evaluate MODEL --text report.txt --tasks facts open
    vllm-kvzip evaluate tests/models/tiny-retriever --scorers kvzip \\
        --modes evict quantize mixed --keep-bytes-ratios 0.5 0.25 0.125 0.0625

The context is compressed before any question is read (query-agnostic): each context is sent alone,
then all questions about it start from its compressed prefix, and the run fails unless each of them
did. With ``--query-aware`` each question also ends the context that is compressed, so the scorer
has seen it, and is then asked again. Tasks of running text are for any model (``text_tasks.py``);
others are made of the words the tiny test models know (``word_tasks.py``).

Each cell says which share of the answers is right; how many nats a token of the reference answers
is less likely than without compression ("lost"); how far the next token's distribution is from the
uncompressed model's along its own answer ("KL", and the share of equal first choices); and what the
contexts' blocks came down to by the engine's own count ("held"). Brackets are 95 % intervals in
which the answers about one context count as a cluster. With ``--max-loss`` the smallest cache
within that loss is named.

With ``--quality-losses`` each context keeps what it needs by estimate (setting ``quality_loss``).
Cells tell the estimates and what was held, and below the table stands how well the estimates
foretell the measured distance: rank correlation and bias.

With ``--keep-bytes-ratios`` rows are compared by bytes. The cache is bfloat16 then, because 4 bits
save twice as much of a float32 one.

Real vLLM, one engine per row; requests name their keep ratio.
"""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from tqdm import tqdm

from vllm_kvzip.config import MOST_KEPT
from vllm_kvzip.errors import KVzipError
from vllm_kvzip.evaluation.engines import versions
from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT
from vllm_kvzip.evaluation.quality.report import (
    cell,
    draw,
    promise_kept,
    quality_table,
    recommend,
)
from vllm_kvzip.evaluation.quality.rows import ROWS, Row, make_rows
from vllm_kvzip.evaluation.quality.run import QualityRun
from vllm_kvzip.evaluation.tasks.quality_documents import make_documents
from vllm_kvzip.planning.request_options import KEEP_RATIO, QUALITY_LOSS

if TYPE_CHECKING:
    import argparse

    from vllm_kvzip.evaluation.quality.metrics import Measured
    from vllm_kvzip.evaluation.tasks.documents import Document

NO_COMPRESSION = "no compression"
ALL_PAIRS = "all"  # key of the cells that evict nothing, in place of a ratio


def measure_rows(
    args: argparse.Namespace, documents: list[Document], rows: list[Row]
) -> tuple[dict[str, dict[str, Measured]], dict[str, dict[str, dict[str, Any]]]]:
    """Run every row, without compression first.

    Returns:
        Name -> key of the column -> what was found, and the plugin's settings likewise.
    """
    by_bytes = args.keep_bytes_ratios is not None
    by_loss = args.quality_losses is not None
    ratios = args.quality_losses or (args.keep_bytes_ratios if by_bytes else args.keep_ratios)
    run = QualityRun(args.model, documents, dtype=args.dtype, num_ranks=args.tensor_parallel_size)
    measured: dict[str, dict[str, Measured]] = {}
    used: dict[str, dict[str, dict[str, Any]]] = {}
    bar = tqdm([None, *rows], desc="engines")
    for row in bar:
        if row is None:
            bar.set_postfix_str(NO_COMPRESSION)
            measured[NO_COMPRESSION] = {ALL_PAIRS: run.uncompressed()}
            continue
        name = row.name if by_bytes or args.modes != ["evict"] else row.scorer
        bar.set_postfix_str(name)
        asked = ratios if row.evicts else [1.0]
        keys = [f"{ratio:g}" for ratio in asked] if row.evicts else [ALL_PAIRS]
        more = dict(args.settings)
        if args.prefill_budget is not None:
            more["prefill_budget"] = args.prefill_budget
        settings = {ratio: {**_settings(args, row, ratio), **more} for ratio in asked}
        option = QUALITY_LOSS if by_loss else KEEP_RATIO
        try:
            found = run.compressed(settings[max(asked)], asked, option)
        except KVzipError as error:
            sys.exit(f"\n{name}: {error}")
        measured[name] = dict(zip(keys, found, strict=True))
        used[name] = {key: settings[ratio] for key, ratio in zip(keys, asked, strict=True)}
    return measured, used


def _settings(args: argparse.Namespace, row: Row, asked: float) -> dict[str, Any]:
    """The plugin's settings of a cell: a row, at a ratio or a quality loss."""
    if args.quality_losses is None:
        return row.settings(asked, args.keep_bytes_ratios is not None)
    return {**row.settings(MOST_KEPT, False), "quality_loss": asked}


def run(args: argparse.Namespace) -> int:
    """Measure and report what ``command.py`` was asked for; returns the exit code."""
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})
    scorers = list(ROWS)
    if args.scorers:
        scorers = [f"{s}+{b}" if b else s for s in args.scorers for b in args.budgets]
    rows = make_rows(scorers, args.modes, args.formats, args.full_shares)
    try:
        named = make_documents(
            args.model,
            args.tasks,
            num_contexts=args.num_contexts,
            context_tokens=args.context_tokens,
            questions=args.questions,
            seed=args.seed,
            text=args.text,
            is_query_aware=args.query_aware,
        )
    except KVzipError as error:
        sys.exit(f"{args.prog}: error: {error}")
    measured, used = measure_rows(args, [document for _, document in named], rows)
    report(args, named, measured, used)
    return 0


def report(
    args: argparse.Namespace,
    named: list[tuple[str, Document]],
    measured: dict[str, dict[str, Measured]],
    used: dict[str, dict[str, dict[str, Any]]],
) -> None:
    """Print, write and draw what was found."""
    by_bytes = args.keep_bytes_ratios is not None
    ratios = args.quality_losses or (args.keep_bytes_ratios if by_bytes else args.keep_ratios)
    kind = "loss" if args.quality_losses else "bytes" if by_bytes else "keep"
    columns = {ALL_PAIRS: "all KV pairs"} | {f"{ratio:g}": f"{kind} {ratio:g}" for ratio in ratios}
    about = "query-aware" if args.query_aware else "query-agnostic"
    if args.prefill_budget is not None:
        about += f", prefill budget {args.prefill_budget}"
    if args.tensor_parallel_size > 1:
        about += f", {args.tensor_parallel_size} ranks"
    about += f", {args.dtype}" if args.dtype != "float32" else ""
    groups = {task: [t == task for t, _ in named] for task in args.tasks}
    groups = {"all tasks": [True] * len(named), **groups} if len(groups) > 1 else groups
    console = Console(width=32 + 28 * len(columns))
    results: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for group, members in groups.items():
        full = measured[NO_COMPRESSION][ALL_PAIRS].of(members)
        results[group] = {
            name: {
                key: cell(full if name == NO_COMPRESSION else found.of(members), full)
                for key, found in cells.items()
            }
            for name, cells in measured.items()
        }
        own = [document for (_, document), member in zip(named, members, strict=True) if member]
        questions = sum(len(document.questions) for document in own)
        title = f"{group}: {questions} questions, {about}, contexts of {args.context_tokens}"
        console.print(quality_table(title, columns, results[group]))
        for name, cells in measured.items() if args.quality_losses else ():
            told = promise_kept({key: found.of(members) for key, found in cells.items()})
            if told:
                console.print(f"{name}: {told}")
    console.print(versions())
    first = next(iter(results.values()))
    if args.max_loss is not None:
        print(recommend(first, used, args.max_loss))
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), **results}, indent=2) + "\n")
    if args.plot:
        draw(args.plot, first)
    sys.stdout.flush()
