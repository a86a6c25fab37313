"""Questions about a folder of documents: an example of the client.

    VLLM_PLUGINS=kvzip vllm serve MODEL --kv-compression kvzip --enable-prompt-tokens-details
    python scripts/read_documents.py FOLDER questions.txt --server http://localhost:8000

Every file of the folder is read once. Each line of the second file is a question, asked of all
documents. Files that cannot be read are named and left out.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from vllm_kvzip.client import ClientError, ContextLibrary, Reader, read_document
from vllm_kvzip.client.errors import DocumentError


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    try:
        questions = args.questions.read_text(encoding="utf-8").splitlines()
        return ask(args, [line.strip() for line in questions if line.strip()])
    except (ClientError, OSError, UnicodeDecodeError) as error:
        print(f"read_documents: error: {error}", file=sys.stderr)
        return 1


def ask(args: argparse.Namespace, questions: list[str]) -> int:
    """Read the folder, print an answer to each question, and what all of it cost."""
    key = os.environ.get("VLLM_API_KEY")
    with ContextLibrary(args.server, api_key=key, part_tokens=args.part_tokens) as library:
        readings = []
        for path in sorted(path for path in args.folder.rglob("*") if path.is_file()):
            try:
                reading = library.read(read_document(path))
            except DocumentError as error:
                print(f"left out: {error}")
                continue
            readings.append(reading)
            print(f"{path}: {len(reading.parts)} parts")
        reader = Reader(library, readings, quoting=args.quoting)
        answers = reader.ask_all(questions, verify=args.verify)
        for answer in answers:
            print(f"\n? {answer.question}\n  {answer.text}")
            for quote in answer.quotes:
                print(f'    "{quote.text}"  {quote.document}, from character {quote.start}')
            for note in answer.notes:
                print(f"    note: {note}")
        costs = [answer.statistics for answer in answers]
        print(
            f"\nread {library.counts.read_tokens} tokens once; then {len(answers)} questions took "
            f"{sum(cost.calls for cost in costs)} calls over "
            f"{sum(cost.prompt_tokens for cost in costs)} prompt tokens, of which "
            f"{sum(cost.reused_tokens or 0 for cost in costs)} were reused."
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("questions", type=Path, help="a text file, one question a line")
    parser.add_argument("--server", default="http://localhost:8000", help="its URL")
    parser.add_argument("--part-tokens", type=int, help="of a part; what the server holds")
    parser.add_argument("--quoting", choices=["asked", "strict", "none"], default="asked")
    parser.add_argument("--verify", action="store_true", help="check each claim")
    return parser


if __name__ == "__main__":
    sys.exit(main())
