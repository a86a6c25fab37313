"""What does compression cost a model's answers? By scorer, budget and keep ratio; any model.

    python scripts/eval_quality.py --model MODEL --max-loss 0.05
    python scripts/eval_quality.py --model MODEL --text report.txt --tasks facts open
    python scripts/eval_quality.py --model tests/models/tiny-retriever --scorers kvzip \\
        --modes evict quantize mixed --keep-bytes-ratios 0.5 0.25 0.125 0.0625

The context is compressed before any question is read (query-agnostic): each context is sent alone,
then all questions about it start from its compressed prefix, and the run fails unless each of them
did. With ``--query-aware`` each question also ends the context that is compressed, so the scorer
has seen it, and is then asked again. Tasks of running text are for any model (``text_tasks.py``);
others are made of the words the tiny test models know (``quality_tasks.py``).

Each cell says which share of the answers is right; how many nats a token of the reference answers
is less likely than without compression ("lost"); how far the next token's distribution is from the
uncompressed model's along its own answer ("KL", and the share of equal first choices); and what the
contexts' blocks came down to by the engine's own count ("held"). Brackets are 95 % intervals in
which the answers about one context count as a cluster. With ``--max-loss`` the smallest cache
within that loss is named.

With ``--keep-bytes-ratios`` rows are compared by bytes. The cache is bfloat16 then, because 4 bits
save twice as much of a float32 one.

Real vLLM, one engine per row; requests name their keep ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from evaluation import versions
from local_server import CPU_ENVIRONMENT
from quality_documents import ALL_TASKS, make_documents, settle_tasks
from quality_report import cell, draw, quality_table, recommend
from quality_rows import ROWS, Row, make_rows
from quality_run import QualityRun
from rich.console import Console
from tqdm import tqdm

from vllm_kvzip.config import Mode
from vllm_kvzip.errors import ConfigError, KVzipError
from vllm_kvzip.registry import FORMATS

if TYPE_CHECKING:
    from documents import Document
    from quality_metrics import Measured

KEEP_RATIOS = (0.5, 0.3, 0.2, 0.1)
NO_COMPRESSION = "no compression"
ALL_PAIRS = "all"  # key of the cells that evict nothing, in place of a ratio


def formats(text: str) -> str:
    """One format's name, or those of keys and values with a plus between.

    Raises:
        argparse.ArgumentTypeError: for another name.
    """
    names = text.split("+")
    if len(names) > 2 or not set(names) <= set(FORMATS.names()):
        known = ", ".join(FORMATS.names())
        raise argparse.ArgumentTypeError(f"{text!r} is none of {known}, nor two of them with a +")
    return text


def setting(text: str) -> tuple[str, Any]:
    """``name=value``; a value that is not JSON is text.

    Raises:
        argparse.ArgumentTypeError: without an equals sign.
    """
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with weights and tokenizer")
    parser.add_argument(
        "--tasks", nargs="+", choices=ALL_TASKS, help="default: what suits the model"
    )
    parser.add_argument(
        "--text",
        nargs="+",
        help="files that contexts are cut from; python-docs is Python's reference",
    )
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
    parser.add_argument("--questions", type=int, help="per context; default 3, of words 24")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument(
        "--settings",
        nargs="+",
        type=setting,
        default=[],
        help="more of the plugin's, for every row, such as profile=none",
    )
    parser.add_argument("--max-loss", type=float, help="nats a token; name the smallest cache")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG; needs matplotlib")
    args = parser.parse_args()
    try:
        vocabulary_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError):
        parser.error(f"--model {args.model} is no folder of a model with a config.json")
    try:
        settle_tasks(args, vocabulary_size)
    except ConfigError as error:
        parser.error(str(error))
    args.dtype = args.dtype or ("float32" if args.keep_bytes_ratios is None else "bfloat16")
    return args


def measure_rows(
    args: argparse.Namespace, documents: list[Document], rows: list[Row]
) -> tuple[dict[str, dict[str, Measured]], dict[str, dict[str, dict[str, Any]]]]:
    """Run every row, without compression first.

    Returns:
        Name -> key of the column -> what was found, and the plugin's settings likewise.
    """
    by_bytes = args.keep_bytes_ratios is not None
    ratios = args.keep_bytes_ratios if by_bytes else args.keep_ratios
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
        try:
            found = run.compressed({**row.settings(max(asked), by_bytes), **more}, asked)
        except KVzipError as error:
            sys.exit(f"\n{name}: {error}")
        measured[name] = dict(zip(keys, found, strict=True))
        used[name] = {
            key: {**row.settings(ratio, by_bytes), **more}
            for key, ratio in zip(keys, asked, strict=True)
        }
    return measured, used


def main() -> None:
    args = parse_args()
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
        sys.exit(f"eval_quality: error: {error}")
    measured, used = measure_rows(args, [document for _, document in named], rows)
    report(args, named, measured, used)


def report(
    args: argparse.Namespace,
    named: list[tuple[str, Document]],
    measured: dict[str, dict[str, Measured]],
    used: dict[str, dict[str, dict[str, Any]]],
) -> None:
    """Print, write and draw what was found."""
    by_bytes = args.keep_bytes_ratios is not None
    ratios = args.keep_bytes_ratios if by_bytes else args.keep_ratios
    columns = {ALL_PAIRS: "all KV pairs"}
    columns |= {f"{ratio:g}": f"{'bytes' if by_bytes else 'keep'} {ratio:g}" for ratio in ratios}
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
    console.print(versions())
    first = next(iter(results.values()))
    if args.max_loss is not None:
        print(recommend(first, used, args.max_loss))
    if args.json:
        args.json.write_text(json.dumps({"versions": versions(), **results}, indent=2) + "\n")
    if args.plot:
        draw(args.plot, first)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
