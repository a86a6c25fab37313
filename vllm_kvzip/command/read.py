"""``vllm-kvzip read``: ask questions about files, over the compressed cache of a running server."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvzip.command.server_calls import KEY_VARIABLE, add_server

if TYPE_CHECKING:
    from collections.abc import Sequence


INTERRUPTED = 130
MIB = 2**20


def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Read the files, ask the questions, print the answers.

    Args:
        argv: arguments; None: those of the process.
        prog: how the program is called.

    Returns:
        0, also when the files do not say it; 1 when a file cannot be read or a page not written,
        or the server refuses or does not answer; 130 when the user stopped it.
    """
    args = _parser(prog).parse_args(argv)
    name = prog or "read"
    try:
        from vllm_kvzip.client import ClientError
        from vllm_kvzip.command.reading_progress import Progress
    except ImportError as error:
        print(
            f"{name}: error: the package {error.name} is missing; pip install "
            f"'vllm-kvzip[client]' brings it.",
            file=sys.stderr,
        )
        return 1
    try:
        with Progress(shown=not args.json and sys.stderr.isatty()) as progress:
            told, failures = _ask(args, progress)
    except (ClientError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped; the server was told to drop its requests.", file=sys.stderr)
        return INTERRUPTED
    print(json.dumps(told, indent=2) if args.json else in_words(told))
    for failure in failures:
        print(f"{name}: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _ask(args: argparse.Namespace, progress: Any) -> tuple[dict[str, Any], list[str]]:
    """What ``--json`` prints: documents, answers, pages, how it was without compression.

    Returns:
        it, and what failed when the answers were there, one sentence each.
    """
    from vllm_kvzip.client import ClientError, read_document

    failures: list[str] = []
    if args.report is not None:
        args.report.mkdir(parents=True, exist_ok=True)
    documents = [read_document(file) for file in args.files]
    told = _run(args, documents, progress, failures, compress=True)
    if args.compare:
        try:
            told["without_compression"] = _run(args, documents, progress, failures, compress=False)
        except ClientError as error:
            failures.append(f"Without compression: {error}")
    return told, failures


def _run(
    args: argparse.Namespace,
    documents: Sequence[Any],
    progress: Any,
    failures: list[str],
    *,
    compress: bool,
) -> dict[str, Any]:
    from vllm_kvzip.client import ClientError, ContextLibrary, Reader

    with ContextLibrary(
        args.server,
        api_key=args.api_key or os.environ.get(KEY_VARIABLE),
        model=args.model,
        part_tokens=args.part_tokens,
        keep_ratio=args.keep_ratio if compress else None,
        keep_files=args.keep_files and compress,
        compress=compress,
        on_progress=progress.read,
    ) as library:
        begin = time.perf_counter()
        readings = [library.read(document) for document in documents]
        seconds = time.perf_counter() - begin
        reader = Reader(
            library,
            readings,
            quoting=args.quoting,
            answer_tokens=args.answer_tokens,
            most_calls=args.most_calls,
        )
        answers = []
        for number, question in enumerate(args.question, 1):
            progress.ask(number, len(args.question), question)
            answers.append(reader.ask(question, verify=args.verify))
        parts = [part for reading in readings for part in reading.parts]
        pages: list[str] = []
        if args.report is not None and compress:
            from vllm_kvzip.command.part_pages import write_pages

            try:
                pages = write_pages(
                    library, readings, args.report, args.keep_ratio, progress.explain
                )
            except (ClientError, OSError) as error:
                failures.append(str(error))
        return {
            "documents": [
                {"name": r.document.name, "sha256": r.document.digest, "parts": len(r.parts)}
                for r in readings
            ],
            "reading": {
                "seconds": seconds,
                "read_tokens": library.counts.read_tokens,
                "parts_read": library.counts.parts_read,
                "parts_found": library.counts.parts_found,
                "parts_imported": library.counts.parts_imported,
                "blocks_held": sum(part.blocks_held for part in parts),
                "blocks_before": sum(part.blocks_before for part in parts),
            },
            "answers": [answer.as_dict() for answer in answers],
            "pages": pages,
        }


def in_words(told: dict[str, Any]) -> str:
    """For people, several lines."""
    read = told["reading"]
    parts = sum(document["parts"] for document in told["documents"])
    lines = [
        f"{parts} parts: {read['parts_read']} read ({read['read_tokens']} tokens), "
        f"{read['parts_found']} cached already, {read['parts_imported']} imported, "
        f"{read['seconds']:.1f} s; {read['blocks_held']} of {read['blocks_before']} KV blocks held"
    ]
    for answer in told["answers"]:
        lines += ["", f"? {answer['question']}", f"  {answer['text']}"]
        lines += [f'    "{quote["text"]}"  {_place(quote)}' for quote in answer["quotes"]]
        verdicts = [claim for claim in answer["claims"] if claim["verdict"] != "quoted"]
        lines += [f"    {claim['verdict']}: {_verdict(claim)}" for claim in verdicts]
        lines += [f"    note: {note}" for note in answer["notes"]]
        lines.append(f"    {_cost(answer['statistics'], len(answer['rejected']))}")
    if told["pages"]:
        count, folder = len(told["pages"]), Path(told["pages"][0]).parent
        lines += ["", f"Pages that show what is kept, with the whole text: {count}, in {folder}"]
    if "without_compression" in told:
        lines += ["", *_comparison(told, told["without_compression"])]
    return "\n".join(lines)


def _place(quote: dict[str, Any]) -> str:
    page = f", page {quote['page']}" if quote["page"] else ""
    return (
        f"({quote['document']}{page}, part {quote['part'] + 1}, characters "
        f"{quote['start']}-{quote['end']})"
    )


def _verdict(claim: dict[str, Any]) -> str:
    if claim["verdict"] == "revised":
        return f"{claim['text']} (first: {claim['draft']})"
    return f"{claim['text']} {claim['reason']}".rstrip()


def _cost(cost: dict[str, Any], rejected: int) -> str:
    facts = [
        f"{cost['calls']} calls",
        f"{cost['prompt_tokens']} prompt tokens",
        *([] if cost["reused_tokens"] is None else [f"{cost['reused_tokens']} of them reused"]),
        f"{cost['seconds']:.2f} s",
        f"{cost['tokens_per_second']:.1f} tokens/s",
    ]
    if cost["first_token_seconds"] is not None:
        facts.append(f"first token after {cost['first_token_seconds']:.2f} s")
    if cost["accepted_share"] is not None:
        facts.append(f"{cost['accepted_share']:.0%} of drafted tokens accepted")
    if cost["estimated_bytes_saved"]:
        facts.append(f"{cost['estimated_bytes_saved'] / MIB:.1f} MiB saved (estimated)")
    for count, what in (
        (cost["retries"], "retries"),
        (cost["parts_read_again"], "parts read again"),
        (rejected, "claims rejected"),
    ):
        if count:
            facts.append(f"{count} {what}")
    return ", ".join(facts)


def _comparison(told: dict[str, Any], without: dict[str, Any]) -> list[str]:
    rows = [f"{'':<34} | {'compressed':>12} | {'without':>12}"]

    def row(name: str, form: str, of: Any) -> None:
        rows.append(f"{name:<34} | {of(told):>12{form}} | {of(without):>12{form}}")

    def total(what: str) -> Any:
        return lambda run: sum(a["statistics"][what] for a in run["answers"])

    def tells(run: dict[str, Any]) -> bool:
        return all(a["statistics"]["read_tokens"] is not None for a in run["answers"])

    row("seconds to read", ".2f", lambda run: run["reading"]["seconds"])
    row("tokens read", "d", lambda run: run["reading"]["read_tokens"])
    row("KV blocks held by the documents", "d", lambda run: run["reading"]["blocks_held"])
    row("calls", "d", total("calls"))
    if tells(told) and tells(without):
        row("prompt tokens computed by questions", "d", total("read_tokens"))
    row("seconds to answer", ".2f", total("seconds"))
    rows.append("")
    for with_it, without_it in zip(told["answers"], without["answers"], strict=True):
        rows.append(f"? {with_it['question']}")
        rows.append(f"  compressed: {with_it['text']}")
        rows.append(f"     without: {without_it['text']}")
    return rows


def _parser(prog: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Ask questions about text, Markdown, HTML and PDF files of any length. A "
        "running server reads each part once and keeps it compressed; answers come with quotes.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("--question", action="append", required=True, help="may be given again")
    add_server(parser)
    parser.add_argument("--model", help="to ask; the server's first one unless given")
    parser.add_argument(
        "--verify", action="store_true", help="let the model say each claim again, and compare"
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument(
        "--compare", action="store_true", help="ask the same without compression too"
    )
    parser.add_argument(
        "--quoting",
        choices=["asked", "strict", "none"],
        default="asked",
        help="what a claim needs: a passage with its words (strict, for small models), or a "
        "sentence that the model copies (asked, the default), or nothing",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="write a page for each part, which shows what is kept of it; the part is compressed "
        "once more for it",
    )
    parser.add_argument("--part-tokens", type=int, help="of a part; default: what the server holds")
    parser.add_argument("--keep-ratio", type=float, help="kept / all KV pairs; default: its own")
    parser.add_argument(
        "--answer-tokens",
        type=int,
        default=64,
        help="of a part's answer, reasoning included; default 64",
    )
    parser.add_argument("--most-calls", type=int, default=500, help="of one question; default 500")
    parser.add_argument(
        "--keep-files", action="store_true", help="keep contexts in the server's contexts_dir too"
    )
    return parser
