"""What can be asked of ``vllm-kvzip evaluate``; without torch, so that help comes at once."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

from vllm_kvzip.config import Mode
from vllm_kvzip.errors import ConfigError
from vllm_kvzip.evaluation.tasks.quality_documents import ALL_TASKS, settle_tasks
from vllm_kvzip.registry import FORMATS

KEEP_RATIOS = (0.5, 0.3, 0.2, 0.1)


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


def parse_args(argv: list[str] | None = None, prog: str | None = None) -> argparse.Namespace:
    """What the user asks for.

    Args:
        argv: arguments; None: those of the process.
        prog: how the program is called, as messages begin; None: the script's name.
    """
    parser = argparse.ArgumentParser(
        prog, description="What does compression cost a model's answers?"
    )
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
    parser.add_argument(
        "--quality-losses", nargs="+", type=float, help="nats a token, instead of ratios"
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
    args = parser.parse_args(argv)
    try:
        vocabulary_size = json.loads((Path(args.model) / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError):
        parser.error(f"--model {args.model} is no folder of a model with a config.json")
    try:
        settle_tasks(args, vocabulary_size)
    except ConfigError as error:
        parser.error(str(error))
    if args.quality_losses is not None:
        if args.keep_bytes_ratios is not None or args.modes != ["evict"]:
            parser.error("--quality-losses is for mode evict, without --keep-bytes-ratios")
        if not all(0 < loss < float("inf") for loss in args.quality_losses):
            parser.error("--quality-losses must be numbers of nats above 0, such as 0.02")
    args.dtype = args.dtype or ("float32" if args.keep_bytes_ratios is None else "bfloat16")
    args.prog = parser.prog
    return args


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Evaluate; returns the exit code. See :func:`parse_args`."""
    args = parse_args(argv, prog)
    from vllm_kvzip.evaluation.quality.evaluate import run

    return run(args)
