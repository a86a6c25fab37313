"""This plugin beside NVIDIA's kvpress: same model, contexts, questions and number of kept KV pairs.

    python scripts/compare_kvpress.py --model MODEL

Contexts are compressed before any question is read. kvpress runs in an environment of its own,
which the first run makes; see ``kvpress_job.py``. Ours is real vLLM, one engine per row and keep
ratio, see ``eval_quality.py``. It keeps whole blocks, and kvpress is given the keep ratio that it
arrives at. Otherwise methods are as they come: every head of ours also keeps sinks and 16 recent
tokens, kvpress's KVzip keeps the sinks. Prints accuracy with a 95 % Wilson interval, the share of
the cache's bytes that is really held, and how alike KVzip's scores are in both.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from transformers import AutoConfig

from benchmarks.comparison_report import (
    Rows,
    accuracy_table,
    agreement_table,
    cell,
    draw,
    kvpress_rows,
    score_agreement,
)
from benchmarks.kvpress_venv import DEFAULT_VENV, METHODS, kvpress_python, run_kvpress
from vllm_kvzip.config import load_config
from vllm_kvzip.errors import ConfigError, KVzipError, suggest
from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT
from vllm_kvzip.evaluation.model_files import fingerprint_of, repeat_ids
from vllm_kvzip.evaluation.quality.rows import settings_of
from vllm_kvzip.evaluation.quality.run import QualityRun
from vllm_kvzip.evaluation.tasks.quality_documents import ALL_TASKS, make_documents, settle_tasks
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.scoring import available_scorers

if TYPE_CHECKING:
    from vllm_kvzip.evaluation.tasks.documents import Document

OURS = ("kvzip", "surrogate", "default", "keydiff", "expected-attention", "window", "random")
KEEP_RATIOS = (0.5, 0.3, 0.2, 0.1)
BLOCK_SIZE = 32  # as ``start_engine`` sets it
MIN_CONTEXT_TOKENS = 96  # SnapKV needs more than its window of 64
ROOM_TOKENS = 64  # for a question and its answer
AGREEMENT = 0.02  # of both stacks without compression


def held_share(settings: dict[str, Any], context_tokens: int) -> float:
    """Share of a context's KV pairs that the plugin holds: whole blocks, and a dense tail.

    Raises:
        ConfigError: if a setting is wrong or no block would be freed.
    """
    config = load_config(None, {}, {"kvzip": settings})
    rule = PrefixRule(
        config.ratio, config.min_prompt_tokens, config.sink_tokens, config.recent_tokens,
        BLOCK_SIZE,
    )  # fmt: skip
    plan = rule.plan(context_tokens, RequestOptions(context_tokens))
    if plan is None:
        raise ConfigError(
            f"--keep-ratios {config.ratio:g} frees no block of {BLOCK_SIZE} tokens in "
            f"contexts of {context_tokens}; lower it or raise --context-tokens."
        )
    tail = context_tokens - plan.boundary_tokens
    return (plan.num_compressed_blocks * BLOCK_SIZE + tail) / context_tokens


def our_rows(
    args: argparse.Namespace, documents: list[Document], console: Console
) -> tuple[dict[str, Any], Rows]:
    """The same of this plugin: one engine per row and keep ratio, and one without compression."""
    rows: Rows = {}
    with console.status("vLLM without compression") as status:
        run = QualityRun(args.model, documents)
        none = cell(run.uncompressed().counts, 1.0, 1.0)
        for row in args.ours:
            cells = rows[f"ours: {row}"] = {}
            for ratio in args.keep_ratios:
                status.update(f"ours: {row}, keep ratio {ratio:g}")
                settings = our_settings(args, row, ratio)
                share = held_share(settings, args.context_tokens)
                (found,) = run.compressed(settings, [ratio])
                cells[f"{ratio:g}"] = cell(found.counts, share, share)
    return none, rows


def our_settings(args: argparse.Namespace, row: str, keep_ratio: float) -> dict[str, Any]:
    """The plugin's settings of one cell; chunks and wording as kvpress gets them."""
    wording = {"repeat_prompt": args.repeat_prompt} if args.repeat_prompt else {}
    settings = settings_of(row, keep_ratio)
    return {**settings, "scoring_chunk_tokens": args.chunk_tokens, **wording}


def check(args: argparse.Namespace, config: Any) -> None:
    """Refuse what can be known to be wrong before the long work; fill in what was not named.

    Raises:
        ConfigError: with one sentence.
    """
    rows = ("default", *available_scorers())
    for flag, values, known in (
        ("--methods", args.methods, METHODS),
        ("--tasks", args.tasks or (), ALL_TASKS),
        ("--ours", [row if "default" in row else row.partition("+")[0] for row in args.ours], rows),
    ):
        for value in values:
            if value not in known:
                raise ConfigError(f"{flag}: there is no {value}; {suggest(value, known)}")
    settle_tasks(args, config.vocab_size, answered=True)
    for name in ("num_contexts", "questions", "chunk_tokens"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1.")
    most = config.max_position_embeddings - ROOM_TOKENS
    if not MIN_CONTEXT_TOKENS <= args.context_tokens <= most:
        raise ConfigError(
            f"--context-tokens {args.context_tokens} must be from {MIN_CONTEXT_TOKENS} to {most}, "
            f"which leaves room for questions."
        )
    for path in (args.json, args.plot):
        if path and not path.absolute().parent.is_dir():
            raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}.")
    for ratio in args.keep_ratios:
        if not 0 < ratio <= 1:
            raise ConfigError(f"--keep-ratios {ratio:g} must be above 0 and at most 1.")
        for row in args.ours:
            held_share(our_settings(args, row, ratio), args.context_tokens)


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder with weights and tokenizer")
    parser.add_argument("--tasks", nargs="+", help="default: what suits the model")
    parser.add_argument("--text", nargs="+", help="files that contexts are cut from")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="of kvpress")
    parser.add_argument("--ours", nargs="+", default=list(OURS), help="scorer or scorer+budget")
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument("--num-contexts", type=int, default=12, help="of each task")
    parser.add_argument("--questions", type=int, help="per context; default 3, of words 24")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--chunk-tokens", type=int, default=512, help="KVzip repeats at once")
    parser.add_argument("--repeat-prompt", help="for KVzip; default: of the model's head profile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--venv", type=Path, default=DEFAULT_VENV, help="of kvpress")
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG; needs matplotlib")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> None:
    """Run everything and print it.

    Raises:
        KVzipError: with one sentence, if something given is wrong.
    """
    fingerprint = fingerprint_of(args.model)
    check(args, AutoConfig.from_pretrained(args.model).get_text_config())
    documents = [
        document
        for _, document in make_documents(
            args.model, args.tasks, num_contexts=args.num_contexts,
            context_tokens=args.context_tokens, questions=args.questions, seed=args.seed,
            text=args.text,
        )
    ]  # fmt: skip
    if not all(question.scored_places for document in documents for question in document.questions):
        raise ConfigError(
            "--tasks: some questions have no right answer, which this comparison needs."
        )
    python = kvpress_python(args.venv)
    total = sum(
        1 if question.is_whole else len(question.scored_places)
        for document in documents
        for question in document.questions
    )
    columns = {
        f"{ratio:g}": held_share(settings_of("default", ratio), args.context_tokens)
        for ratio in args.keep_ratios
    }
    ids = repeat_ids(args.model, fingerprint, args.repeat_prompt)
    work = {
        "model": str(Path(args.model).absolute()),
        "documents": [asdict(document) for document in documents],
        "methods": args.methods,
        "keep_ratios": columns,
        "repeat_ids": ids,
        "chunk_tokens": args.chunk_tokens,
        "seed": args.seed,
    }
    result, scores = run_kvpress(python, work)
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})
    console = Console(width=120)
    their_none, theirs = kvpress_rows(result, list(columns))
    our_none, ours = our_rows(args, documents, console)
    rows = {
        "transformers: no compression": dict.fromkeys(columns, their_none),
        "vLLM: no compression": dict.fromkeys(columns, our_none),
        **theirs,
        **ours,
    }
    title = f"{', '.join(args.tasks)}: {total} answers, contexts of {args.context_tokens}"
    console.print(accuracy_table(title, list(columns), rows))
    kept = ", ".join(f"{share:.3f} at {column}" for column, share in columns.items())
    console.print(f"Whole blocks of {BLOCK_SIZE} tokens; KV pairs kept by every method: {kept}.")
    if abs(their_none["accuracy"] - our_none["accuracy"]) > AGREEMENT:
        console.print("The stacks differ without compression already: compare with care.")
    # Behind the engines: they fork, which does not go well once torch has computed something.
    found = {}
    if scores is not None:
        found = score_agreement(args.model, documents[0].tokens, ids, args.chunk_tokens, scores)
        console.print(agreement_table(found))
    import vllm

    versions = {"vLLM": vllm.__version__, **result["versions"]}
    console.print(
        f"{', '.join(f'{name} {value}' for name, value in versions.items())} (the last two with "
        f"kvpress), {platform.machine()} {os.cpu_count()} cores, {date.today().isoformat()}"
    )
    if args.json:
        values = {"versions": versions, "rows": rows, "rank_correlation": found}
        args.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        draw(args.plot, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    try:
        compare(parse_args(argv))
    except KVzipError as error:
        print(f"compare_kvpress: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
