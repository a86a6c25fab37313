"""``vllm-kvzip contexts``: compressed contexts of a running server, as files of its folder."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime
from typing import Any

from vllm_kvzip.command.server_calls import Refused, add_server, call_server


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Export, import, or list.

    Args:
        argv: arguments; None: those of the process.
        prog: how the program is called.

    Returns:
        0; 1 when the server refuses or does not answer.
    """
    args = _parser(prog).parse_args(argv)
    try:
        told = _ask(args)
    except Refused as refusal:
        print(f"{prog or 'contexts'}: error: {refusal}", file=sys.stderr)
        return 1
    print(json.dumps(told, indent=2) if args.json else _in_words(args.what, told))
    return 0


def _ask(args: argparse.Namespace) -> dict[str, Any]:
    if args.what == "list":
        told = call_server(args, "")
        try:
            return {**told, **call_server(args, "/files")}
        except Refused as refusal:  # it has no folder
            return {**told, "no_files": str(refusal)}
    if args.what == "import":
        return call_server(args, "/import", {"name": args.name})
    body = {"id": args.id, "name": args.name, "keep_ratio": args.keep_ratio}
    given = {name: value for name, value in body.items() if value is not None}
    return call_server(args, "/export", given)


def _in_words(what: str, told: dict[str, Any]) -> str:
    if what == "list":
        return "\n".join([*_cached(told["contexts"]), *_files(told)])
    done = "is cached now" if what == "import" else "was written"
    if told.get("was_cached"):
        done = "was cached already"
    return (
        f"{told['name']} {done}: context {told['id']}, {told['compressed_tokens']} tokens, "
        f"{told['blocks_held']} blocks, {told['bytes']} bytes, {told['seconds']:.3f} s. "
        f"Send with a question: {json.dumps(told['send'])}"
    )


def _cached(contexts: list[dict[str, Any]]) -> list[str]:
    rows = [f"{'cached':<12} | {'tokens':>8} | {'blocks':>8}"]
    rows += [
        f"{one['id']:<12} | {one['compressed_tokens']:>8} | {one['blocks_held']:>8}"
        for one in contexts
    ]
    return [*rows, ""]


def _files(told: dict[str, Any]) -> list[str]:
    if "no_files" in told:
        return [told["no_files"]]
    rows = [f"{'id':<12} | {'tokens':>8} | {'bytes':>12} | {'last used (UTC)':<16} | file"]
    for file in told["files"]:
        used = datetime.fromtimestamp(file["last_used"], UTC).strftime("%Y-%m-%d %H:%M")
        tokens = file.get("compressed_tokens", "")
        rows.append(
            f"{file.get('id', 'broken'):<12} | {tokens:>8} | {file['bytes']:>12} | {used:<16} | "
            f"{file['name']}"
        )
    limit = "" if told["most_bytes"] is None else f" of {told['most_bytes']}"
    return [*rows, f"{told['bytes']}{limit} bytes in all."]


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Compressed contexts of a running server as files of its contexts_dir. A file "
        "can be imported by any server with the same model and settings.",
        allow_abbrev=False,
    )
    shared = argparse.ArgumentParser(add_help=False)
    add_server(shared)
    shared.add_argument("--json", action="store_true", help="for programs")
    chosen = parser.add_subparsers(dest="what", required=True)
    saving = chosen.add_parser("export", parents=[shared], help="write a cached context to a file")
    saving.add_argument("id", help="of the context, as listed")
    saving.add_argument("name", nargs="?", help="of the file, no path; the id unless given")
    saving.add_argument("--keep-ratio", type=float, help="of the context, where it has several")
    bringing = chosen.add_parser("import", parents=[shared], help="bring a file into the cache")
    bringing.add_argument("name", help="of the file, as listed")
    chosen.add_parser("list", parents=[shared], help="cached contexts, and files")
    return parser
