"""The demo on the tiny model, where no real one can be had; see ``demo.py``.

The prompt is a context of 1,536 words that ends by asking the model to repeat a passage from the
middle of it. The answer is decoded after the prompt was compressed, so every word of it must be
found in what was kept.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, copy_prompt, make_context

MODEL = str(Path(__file__).parents[2] / "tests" / "models" / "tiny-retriever")
KEEP_RATIO = 0.3
CONTEXT_TOKENS, PASSAGE_AT, ANSWER_TOKENS = 1536, 700, 128
MOST_TOKENS = 4096  # of an answer, for a server that does not tell of the request
# More than the model was trained for: the request is still there whenever it is looked at.
MAX_MODEL_LEN = 32768
LONG = ("--hf-overrides", f'{{"max_position_embeddings": {MAX_MODEL_LEN}}}')


@dataclass
class Run:
    """What one server did with the prompt."""

    answer: list[str]
    blocks_held: int
    metrics: dict[str, float]


def ask(prompt: list[int], *arguments: str) -> Run:
    """Start a server, send the prompt, read the blocks held while it decodes.

    The last reading counts. On a busy machine many words come in one piece, and what a server says
    of itself is as old as the piece before. So it is read again until it tells of the request.
    """
    with LocalServer(MODEL, *LONG, *arguments) as server:
        answer: list[str] = []
        blocks, readings = 0.0, 0
        metrics: dict[str, float] = {}
        stream = server.stream(prompt, MAX_MODEL_LEN - len(prompt))
        for piece in stream:
            answer.extend(piece.split())
            if len(answer) >= ANSWER_TOKENS // 2:
                metrics = server.metrics()
                blocks = server.blocks_held(metrics)
                readings += blocks > 0
            if len(answer) >= (ANSWER_TOKENS if readings > 1 else MOST_TOKENS):
                stream.close()
                break
        return Run(answer[:ANSWER_TOKENS], round(blocks), metrics)


def words_demo() -> int:
    """Run it; returns the exit code."""
    context = make_context(np.random.default_rng(7), CONTEXT_TOKENS, fact_density=0.5)
    prompt, expected_ids = copy_prompt(context, PASSAGE_AT, num_answer_tokens=ANSWER_TOKENS)
    expected = [VOCABULARY.words[index] for index in expected_ids]
    print(f"prompt:   {len(prompt)} tokens, ending in: {VOCABULARY.text(prompt[-5:])}")
    print(f"expected: {' '.join(expected[:24])} ...\n")

    print("1/2  vllm serve MODEL")
    stock = ask(prompt, "--block-size", "32")
    flags = ("--kv-compression", "kvzip", f"--kv-compression-config.keep_ratio={KEEP_RATIO}")
    print(f"2/2  vllm serve MODEL {' '.join(flags)}\n")
    compressed = ask(prompt, *flags)

    for name, run in (("without", stock), ("with", compressed)):
        right = sum(a == b for a, b in zip(run.answer, expected, strict=False))
        print(f"{name:>8}: {' '.join(run.answer[:24])} ...")
        print(f"{'':>8}  {right} of {ANSWER_TOKENS} words right, {run.blocks_held} blocks held\n")
    return conclude(stock.blocks_held, compressed.blocks_held, compressed.metrics)


def conclude(blocks_without: int, blocks_with: int, metrics: dict[str, float]) -> int:
    """Print the server's metrics and what was freed; returns the exit code.

    Args:
        blocks_without: held while the answer was decoded without compression.
        blocks_with: the same with it.
        metrics: of the server that compresses, meanwhile.
    """
    print("the server's own /metrics while it decoded:")
    for name, value in metrics.items():
        if name.startswith("vllm_kvzip") and "_bucket" not in name and "_created" not in name:
            print(f"  {name} {value:g}")
    freed = metrics.get("vllm_kvzip_blocks_freed_total", 0)
    if not freed or blocks_with >= blocks_without:
        print("\ncompression freed nothing: this is a bug", file=sys.stderr)
        return 1
    print(f"\n{freed:.0f} blocks went back to the pool before the answer was decoded.")
    return 0
