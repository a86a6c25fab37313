"""The demo on a real model, in English; see ``demo.py``.

The document is prose of about 3,000 tokens that anybody can read (``evaluation.txt``), and what is
asked for stands in one sentence in the middle of it. The answer is decoded after the prompt was
compressed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from demos.words import conclude
from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.text_source import DEFAULT_TEXT

if TYPE_CHECKING:
    from pathlib import Path

KEEP_RATIO = 0.3
NUM_WORDS = 2150  # of the document, about 3,000 tokens
FACT = "The gate code of the old mill at Vessen is 4821."
QUESTION = "What is the gate code of the old mill at Vessen?"
ANSWER = "4821"
ANSWER_PIECES, LOOK_AT_PIECE = 48, 6
END = "<|im_end|>"
MAX_TOKENS = 2000  # the request is still there when it is looked at


@dataclass
class Run:
    """What one server did with the question."""

    answer: str
    prompt_tokens: int
    blocks_held: int
    metrics: dict[str, float]


def document() -> str:
    """Paragraphs of the text that ships, with the fact between two of them in the middle."""
    paragraphs, num_words = [], 0
    for paragraph in DEFAULT_TEXT.read_text(encoding="utf-8").split("\n\n"):
        num_words += len(paragraph.split())
        if num_words > NUM_WORDS:
            break
        paragraphs.append(paragraph)
    paragraphs.insert(len(paragraphs) // 2, FACT)
    return "\n\n".join(paragraphs)


def ask(model: Path, message: str, *arguments: str) -> Run:
    """Start a server, send the question, read the blocks held while it decodes."""
    with LocalServer(str(model), *arguments) as server:
        answer, blocks = "", 0.0
        metrics: dict[str, float] = {}
        options = {"ignore_eos": True, "skip_special_tokens": False}
        stream = server.stream_chat(message, MAX_TOKENS, **options)
        for number, piece in enumerate(stream):
            answer += piece
            if number == LOOK_AT_PIECE:
                metrics = server.metrics()
                blocks = server.blocks_held(metrics)
            if number > LOOK_AT_PIECE and (END in answer or number == ANSWER_PIECES):
                stream.close()
                break
        read = (v for k, v in metrics.items() if k.startswith("vllm:prompt_tokens_total"))
        return Run(answer.partition(END)[0].strip(), round(next(read)), round(blocks), metrics)


def text_demo(model: Path) -> int:
    """Run it; returns the exit code."""
    message = f"{document()}\n\n{QUESTION}"
    print(f"document: {len(message.split())} words, in the middle: {FACT}")
    print(f"question: {QUESTION}\n")
    print("1/2  vllm serve MODEL", flush=True)
    stock = ask(model, message, "--block-size", "32")
    flags = ("--kv-compression", "kvzip", f"--kv-compression-config.keep_ratio={KEEP_RATIO}")
    print(f"2/2  vllm serve MODEL {' '.join(flags)}\n", flush=True)
    compressed = ask(model, message, *flags)
    for name, run in (("without", stock), ("with", compressed)):
        verdict = "right" if ANSWER in run.answer else "wrong"
        print(f"{name:>8}: {run.answer}")
        print(
            f"{'':>8}  {verdict}, {run.blocks_held} blocks held for {run.prompt_tokens} tokens of "
            f"prompt\n"
        )
    return conclude(stock.blocks_held, compressed.blocks_held, compressed.metrics)
