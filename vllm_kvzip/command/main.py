"""``vllm-kvzip``: what is done beside serving. Each subcommand is imported when it is asked for."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from vllm_kvzip import __version__

PROGRAM = "vllm-kvzip"
SUBCOMMANDS = {
    "profile": ("build a head profile of a model", "vllm_kvzip.profiling.command"),
    "import-scores": (
        "turn published head scores into a head profile",
        "vllm_kvzip.profiling.import_profile",
    ),
    "evaluate": (
        "measure what compression costs a model's answers, on your own texts too",
        "vllm_kvzip.evaluation.quality.command",
    ),
    "doctor": (
        "say what `vllm serve` would do with a model and its flags, without loading it",
        "vllm_kvzip.command.doctor",
    ),
    "contexts": (
        "export, import and list compressed contexts of a running server",
        "vllm_kvzip.command.contexts",
    ),
    "read": (
        "ask questions about files of any length, over a running server",
        "vllm_kvzip.command.read",
    ),
    "report": (
        "write a page that shows what a running server keeps of a document",
        "vllm_kvzip.command.report",
    ),
}
"""Name -> what it does, and the module whose ``main`` does it."""
WITHOUT_MODEL = ("contexts", "report", "read")


def main(argv: list[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        the exit code.
    """
    given = sys.argv[1:] if argv is None else argv
    parser = _parser()
    name = parser.parse_args(given[:1]).subcommand
    run = import_module(SUBCOMMANDS[name][1]).main
    rest = given[1:] if name in WITHOUT_MODEL else name_model(parser, given[1:])
    code: int = run(rest, f"{PROGRAM} {name}")
    return code


def name_model(parser: argparse.ArgumentParser, given: list[str]) -> list[str]:
    """A subcommand's arguments with a leading ``MODEL`` turned into ``--model MODEL``.

    argparse takes an optional positional argument only where no flag stands before it.

    Args:
        parser: says what is wrong, and ends the process, where the model is given twice.
        given: the arguments.
    """
    if not given or given[0].startswith("-"):
        return given
    if any(word == "--model" or word.startswith("--model=") for word in given):
        parser.error("the model is given twice; remove --model")
    return ["--model", *given]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        PROGRAM,
        description="Head profiles, quality, start-up, contexts and documents of vLLM with a "
        "compressed KV cache.",
        epilog=f"`{PROGRAM} SUBCOMMAND --help` lists its flags.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    chosen = parser.add_subparsers(dest="subcommand", required=True, metavar="SUBCOMMAND")
    for name, (summary, _) in SUBCOMMANDS.items():
        first = "" if name in WITHOUT_MODEL else "MODEL "
        usage = f"{PROGRAM} {name} {first}..."
        chosen.add_parser(name, help=summary, add_help=False, usage=usage)
    return parser


if __name__ == "__main__":
    sys.exit(main())
