"""``vllm-kvzip report``: what compression keeps of a document, as a page for a browser."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from vllm_kvzip.command.server_calls import Refused, add_server, call_server
from vllm_kvzip.report.explanation import Explanation
from vllm_kvzip.report.page import make_page

STDIN = "-"


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Let a server compress a document and explain it, and write the page.

    Args:
        argv: arguments; None: those of the process.
        prog: how the program is called.

    Returns:
        0; 1 when the file cannot be read, the server refuses, or the page cannot be written.
    """
    args = _parser(prog).parse_args(argv)
    try:
        text = _read(args.file)
        explanation = Explanation.read(call_server(args, "/explain", _body(args, text)))
        page = make_page(explanation, args.title or _name(args.file))
        Path(args.output).write_text(page, encoding="utf-8")
    except (Refused, OSError, ValueError) as error:
        print(f"{prog or 'report'}: error: {error}", file=sys.stderr)
        return 1
    kept = sum(map(explanation.share_of, explanation.tiers))
    print(
        f"{args.output} was written: {len(explanation.token_texts)} tokens, {kept:.1%} of their "
        f"KV pairs are kept. It holds the whole document."
    )
    return 0


def _read(name: str) -> str:
    """Text of a file.

    Raises:
        ValueError: if it is no text, in one sentence.
    """
    data = sys.stdin.buffer.read() if name == STDIN else Path(name).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{_name(name)} is not UTF-8 text ({error.reason}).") from error
    if not text.strip():
        raise ValueError(f"{_name(name)} is empty.")
    return text


def _name(file: str) -> str:
    return "the document" if file == STDIN else Path(file).name


def _body(args: argparse.Namespace, text: str) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": text}
    if args.chat:
        body = {"messages": [{"role": "user", "content": text}]}
    more = {"keep_ratio": args.keep_ratio, "model": args.model}
    return body | {name: value for name, value in more.items() if value is not None}


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Let a running server compress a document, and write a page that shows what "
        "each KV head keeps of it. The page needs no network and holds the whole document.",
        allow_abbrev=False,
    )
    parser.add_argument("file", help=f"the document, UTF-8 text; {STDIN}: standard input")
    parser.add_argument("--output", default="report.html", help="the page (default: %(default)s)")
    add_server(parser)
    parser.add_argument("--chat", action="store_true", help="the document as a user's message")
    parser.add_argument("--keep-ratio", type=float, help="of this document; else the server's")
    parser.add_argument("--model", help="as in the OpenAI API, such as a LoRA adapter")
    parser.add_argument("--title", help="of the page; else the file's name")
    return parser
