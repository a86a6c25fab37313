"""Many questions over one context: with and without reuse of its compressed prefix, side by side.

    python scripts/ask_one_context.py
    python scripts/ask_one_context.py --url http://localhost:8000 --model NAME \\
        --document report.txt --questions questions.txt

Without ``--url`` it serves the shipped tiny model with a document of 1,800 words and ten questions
whose answers are known. All questions are asked at once through the OpenAI client. First each
request gets a ``cache_salt`` of its own, so that nothing is shared; then the document is compressed
once, and every question starts from it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from openai import AsyncOpenAI

from vllm_kvzip.evaluation.local_server import LocalServer, RunningServer
from vllm_kvzip.evaluation.tasks.retrieval_task import QUESTION, VOCABULARY, make_context

if TYPE_CHECKING:
    from collections.abc import Iterator

TINY_MODEL = str(Path(__file__).parent.parent / "tests" / "models" / "tiny-retriever")
TINY_DOCUMENT_TOKENS, NUM_QUESTIONS = 1800, 10
HITS = "vllm_kvzip_prefix_hits_total"


@dataclass
class Task:
    """A document, questions about it, and the right answers where they are known."""

    document: str
    questions: list[str]
    answers: list[str] | None
    output_tokens: int


@dataclass
class Outcome:
    """What one way of asking cost, and what it brought."""

    seconds: float
    first_token_seconds: float
    peak_blocks: float
    texts: list[str]


def tiny_task() -> Task:
    """Facts among filler, as the tiny model was trained on."""
    context = make_context(np.random.default_rng(5), TINY_DOCUMENT_TOKENS, fact_density=0.3)
    keys = list(context.facts)[:: len(context.facts) // NUM_QUESTIONS][:NUM_QUESTIONS]
    words = VOCABULARY.words
    return Task(
        document=context.text,
        questions=[f" {QUESTION} {words[key]}" for key in keys],
        answers=[words[context.facts[key]] for key in keys],
        output_tokens=64,
    )


def count_tokens(server: RunningServer, text: str) -> int:
    """Tokens of ``text``, by the server's own tokenizer."""
    body = json.dumps({"model": server.model, "prompt": text}).encode()
    headers = {"Content-Type": "application/json", **authorization()}
    request = urllib.request.Request(server.url + "/tokenize", body, headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        return int(json.load(response)["count"])


def authorization() -> dict[str, str]:
    """The header of the key in ``OPENAI_API_KEY``, if there is one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class Asker:
    """Asks through the OpenAI client and watches the server meanwhile."""

    def __init__(self, server: RunningServer, task: Task) -> None:
        self._server = server
        self._task = task
        self._client = AsyncOpenAI(
            base_url=server.url + "/v1", api_key=os.environ.get("OPENAI_API_KEY", "none")
        )
        self._declared = {"kvzip_context_tokens": count_tokens(server, task.document)}

    async def compress(self) -> float:
        """Send the document alone, once; returns the seconds it took."""
        begin = time.perf_counter()
        await self._complete(self._task.document, 2, {"vllm_xargs": self._declared})
        return time.perf_counter() - begin

    async def ask_all(self, shared: bool) -> Outcome:
        """All questions at once; ``shared`` says whether they may share what is cached."""
        peak = [0.0]
        watching = asyncio.create_task(self._watch(peak))
        begin = time.perf_counter()
        replies = await asyncio.gather(*(self._ask(q, shared) for q in self._task.questions))
        seconds = time.perf_counter() - begin
        watching.cancel()
        first = statistics.median(reply[0] for reply in replies)
        return Outcome(seconds, first, peak[0], [reply[1] for reply in replies])

    async def _ask(self, question: str, shared: bool) -> tuple[float, str]:
        extra: dict[str, Any] = {"vllm_xargs": self._declared}
        if not shared:
            extra["cache_salt"] = uuid.uuid4().hex
        prompt = self._task.document + question
        return await self._complete(prompt, self._task.output_tokens, extra)

    async def _complete(
        self, prompt: str, max_tokens: int, extra: dict[str, Any]
    ) -> tuple[float, str]:
        """Seconds to the first token, and the text."""
        begin, first, text = time.perf_counter(), 0.0, ""
        stream = await self._client.completions.create(
            model=self._server.model, prompt=prompt, max_tokens=max_tokens, temperature=0,
            stream=True, extra_body={"ignore_eos": True, **extra},
        )  # fmt: skip
        async for chunk in stream:
            first = first or time.perf_counter() - begin
            text += chunk.choices[0].text
        return first, text

    async def _watch(self, peak: list[float]) -> None:
        while True:
            peak[0] = max(peak[0], await asyncio.to_thread(self._server.blocks_held))
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def open_server(args: argparse.Namespace) -> Iterator[RunningServer]:
    """The server the user named, or one of our own."""
    if args.url:
        yield RunningServer(args.url, args.model)
        return
    flags = ("--kv-compression", "kvzip", "--kv-compression-config.keep_ratio", "0.3")
    print(f"vllm serve {TINY_MODEL} {' '.join(flags)}\n")
    with LocalServer(TINY_MODEL, *flags) as server:
        yield server


async def run(server: RunningServer, task: Task) -> int:
    """Ask both ways and print the table; returns the exit code."""
    asker = Asker(server, task)
    await asker.ask_all(shared=False)  # both ways start warm
    before = server.metrics()
    apart = await asker.ask_all(shared=False)
    compress_seconds = await asker.compress()
    together = await asker.ask_all(shared=True)
    after = server.metrics()
    hits = after.get(HITS, 0) - before.get(HITS, 0)
    print(f"{len(task.questions)} questions at once      | without reuse | with reuse")
    rows = [
        ("all answered after (s)", apart.seconds, together.seconds, ".2f"),
        ("median first token (s)", apart.first_token_seconds, together.first_token_seconds, ".3f"),
        ("peak KV blocks held", apart.peak_blocks, together.peak_blocks, ".0f"),
    ]
    for name, without, reused, form in rows:
        print(f"{name:<25} | {without:>13{form}} | {reused:>10{form}}")
    if task.answers:
        right = [
            sum(text.split()[:1] == [word] for text, word in zip(texts, task.answers, strict=True))
            for texts in (apart.texts, together.texts)
        ]
        print(f"{'right answers':<25} | {right[0]:>13} | {right[1]:>10}")
    print(
        f"\ncompressing the document once took {compress_seconds:.2f} s; then {hits:.0f} of "
        f"{len(task.questions)} requests started from its compressed prefix."
    )
    for name, value in sorted(after.items()):
        if name.startswith("vllm_kvzip_prefix") and not name.endswith("_created"):
            print(f"  {name} {value:g}")
    if not hits:
        print("\nNo request started from a compressed prefix: is compression on?", file=sys.stderr)
    return 0 if hits else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--model", help="its model's name")
    parser.add_argument("--document", type=Path, help="text file")
    parser.add_argument("--questions", type=Path, help="text file, one question per line")
    parser.add_argument("--output-tokens", type=int, default=64)
    args = parser.parse_args()
    task = tiny_task()
    if args.url:
        if not (args.model and args.document and args.questions):
            parser.error("--url needs --model, --document and --questions")
        lines = args.questions.read_text(encoding="utf-8").splitlines()
        questions = [f"\n\n{line}\n" for line in lines if line.strip()]
        document = args.document.read_text(encoding="utf-8")
        task = Task(document, questions, None, args.output_tokens)
    with open_server(args) as server:
        return asyncio.run(run(server, task))


if __name__ == "__main__":
    sys.exit(main())
