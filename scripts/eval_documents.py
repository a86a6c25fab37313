"""A document longer than the model's context: what a reader finds, what it makes up, what it costs.

    python scripts/eval_documents.py                               # SmolLM2-135M-Instruct
    python scripts/eval_documents.py --model PATH -- FLAGS         # flags of vllm serve
    python scripts/eval_documents.py --url http://localhost:8000   # a server that is running

Facts such as "The gate code of the mill is 4821." are hidden in running text. Each is asked for,
some in pairs, and some that are not there though their words are. The script starts a server that
compresses and then one of stock vLLM. With ``--url`` both ways are asked of the same server, the
second one with ``"kvzip": "off"``; it then finds blocks of the first reading in the cache. All
questions are asked at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from real_model import real_model

from reading.hidden_facts import hide_facts
from reading.measured_answers import measure
from vllm_kvzip.client import ContextLibrary
from vllm_kvzip.errors import KVzipError
from vllm_kvzip.evaluation.local_server import LocalServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reading.hidden_facts import HiddenFacts

SERVER_FLAGS = ("--enable-prompt-tokens-details", "--enable-per-request-metrics")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        model = args.model or (None if args.url else str(real_model()))
        found = {}
        ways = ("compressed",) if args.no_stock else ("compressed", "without compression")
        for way in ways:
            with _server(args, model, way == "compressed") as url:
                found[way] = _measured(args, url, way)
    except KVzipError as error:
        print(f"eval_documents: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        args.json.write_text(json.dumps(found, indent=2), encoding="utf-8")
    print(_table(found))
    return 0


def _measured(args: argparse.Namespace, url: str, way: str) -> dict[str, Any]:
    is_compressed = way == "compressed"
    with ContextLibrary(
        url,
        part_tokens=args.part_tokens,
        keep_ratio=args.keep_ratio if args.url and is_compressed else None,
        compress=is_compressed,
        concurrency=args.concurrency,
    ) as library:
        facts = library.run(library.library.server.facts())
        if is_compressed:
            print(
                f"{facts.model}: {facts.max_model_len} positions, a cache of {facts.num_blocks} "
                f"blocks of {facts.block_size} tokens"
            )
        hidden = _hidden(args, library)
        print(f"{way} ...", flush=True)
        return measure(
            library, hidden, quoting=args.quoting, verifies=is_compressed and not args.no_verify
        )


def _hidden(args: argparse.Namespace, library: ContextLibrary) -> HiddenFacts:
    server = library.library.server
    return hide_facts(
        lambda text: library.run(server.count_tokens(text)),
        num_tokens=args.tokens,
        num_facts=args.facts,
        num_absent=args.absent,
        num_pairs=args.pairs,
        seed=args.seed,
    )


@contextmanager
def _server(args: argparse.Namespace, model: str | None, is_compressed: bool) -> Iterator[str]:
    """URL of a server, which is stopped again if it was started here."""
    if args.url:
        yield args.url
        return
    flags = [*SERVER_FLAGS, *args.serve]
    environment = {}
    if is_compressed:
        flags += ["--kv-compression", "kvzip"]
        flags += ["--kv-compression-config.keep_ratio", str(args.keep_ratio)]
        environment["VLLM_PLUGINS"] = "kvzip"
    else:
        flags += ["--block-size", str(args.block_size)]
    assert model is not None
    print(f"vllm serve {model} {' '.join(flags)}", flush=True)
    with LocalServer(model, *flags, environment=environment) as server:
        yield server.url


def _table(found: dict[str, dict[str, Any]]) -> str:
    names = dict.fromkeys(name for figures in found.values() for name in figures)
    width = max(map(len, names))
    lines = [f"| {'':<{width}} | {' | '.join(found)} |", "|---|" + "---|" * len(found)]
    for name in names:
        cells = [_cell(figures.get(name, "")) for figures in found.values()]
        lines.append(f"| {name:<{width}} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", help="folder; SmolLM2-135M-Instruct unless given")
    parser.add_argument("--url", help="of a server that compresses; else servers are started")
    parser.add_argument("--tokens", type=int, default=30_000, help="of the document")
    parser.add_argument("--facts", type=int, default=40, help="hidden in it")
    parser.add_argument("--absent", type=int, default=10, help="asked for and not hidden")
    parser.add_argument("--pairs", type=int, default=10, help="questions for two facts")
    parser.add_argument("--part-tokens", type=int, default=2000, help="of a part, at most")
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--quoting", choices=["strict", "asked"], default="strict")
    parser.add_argument("--concurrency", type=int, default=32, help="calls at the same time")
    parser.add_argument("--block-size", type=int, default=32, help="of the stock server")
    parser.add_argument("--no-stock", action="store_true", help="only with compression")
    parser.add_argument(
        "--no-verify",
        action="store_true",
        help="leave verification out, which only compression is asked for",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("serve", nargs="*", help="behind --: more flags of vllm serve")
    return parser


if __name__ == "__main__":
    sys.exit(main())
