"""How much of a context survives compression? Share of right tokens in a verbatim copy.

    python scripts/eval_copy.py --model tests/models/tiny-retriever

Each prompt is a context that ends in ``repeat`` and four of its tokens; the next 128 greedy tokens
must continue the passage. They are decoded from the compressed cache (the very first one comes from
the prefill and is not counted). Every scorer is run at every keep ratio in real vLLM, beside
``random`` and beside no compression at all. ``default`` is what a user gets who sets nothing.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_kvzip.evaluation.engines import counter, start_engine, versions
from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT
from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context

SCORERS = ("default", "kvzip", "keydiff", "window", "knorm", "streaming", "random")
KEEP_RATIOS = (0.9, 0.7, 0.5, 0.3)
ANSWER_TOKENS = 128

Pairs = list[tuple[list[int], list[int]]]


def make_pairs(num_prompts: int, context_tokens: int, seed: int) -> Pairs:
    """Prompts and the tokens that should follow them."""
    rng = np.random.default_rng(seed)
    contexts = [make_context(rng, context_tokens) for _ in range(num_prompts)]
    return [
        copy_prompt(context, int(rng.integers(context_tokens)), num_answer_tokens=ANSWER_TOKENS)
        for context in contexts
    ]


def right_share(outputs: list[list[int]], pairs: Pairs) -> float:
    """Share of right tokens by position, the first token of each answer left out."""
    hits = [
        np.equal(output[1:], expected[1:]).mean()
        for output, (_, expected) in zip(outputs, pairs, strict=True)
    ]
    return float(np.mean(hits))


def settings_of(scorer: str, keep_ratio: float) -> dict[str, Any]:
    """The plugin's settings of one cell of the table."""
    if scorer == "default":
        return {"keep_ratio": keep_ratio}
    if scorer == "kvzip":  # the profile tells the wording of the repeat prompt
        return {"keep_ratio": keep_ratio, "scorer": scorer}
    return {"keep_ratio": keep_ratio, "scorer": scorer, "profile": "none"}


def measure(model: str, pairs: Pairs, settings: dict[str, Any] | None) -> float:
    """Right share of one configuration, in an engine of its own.

    Raises:
        RuntimeError: if compression was asked for and did not run on every prompt.
    """
    from vllm import SamplingParams

    before = counter("requests_compressed_total")
    llm = start_engine(model, settings)
    sampling = SamplingParams(temperature=0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": prompt} for prompt, _ in pairs]
    results = llm.generate(prompts, sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    if settings is not None and counter("requests_compressed_total") - before != len(pairs):
        raise RuntimeError(f"compression did not run on every prompt with {settings}")
    return right_share([list(result.outputs[0].token_ids) for result in results], pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS))
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the shares here as well")
    args = parser.parse_args()
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})
    console = Console(width=100)
    pairs = make_pairs(args.num_prompts, args.context_tokens, args.seed)
    full = measure(args.model, pairs, None)
    table = Table(title=f"right tokens, {args.num_prompts} prompts of {args.context_tokens}")
    for column in ("scorer", *(f"keep {ratio:g}" for ratio in args.keep_ratios)):
        table.add_column(column)
    table.add_row("no compression", *[f"{full:.3f}"] * len(args.keep_ratios))
    shares: dict[str, dict[str, float]] = {}
    with console.status("starting engines") as status:
        for scorer in args.scorers:
            row = shares[scorer] = {}
            for ratio in args.keep_ratios:
                status.update(f"{scorer}, keep ratio {ratio:g}")
                row[f"{ratio:g}"] = measure(args.model, pairs, settings_of(scorer, ratio))
            table.add_row(scorer, *(f"{share:.3f}" for share in row.values()))
    console.print(table)
    console.print(versions())
    if args.json:
        args.json.write_text(json.dumps({"no compression": full, **shares}, indent=2) + "\n")


if __name__ == "__main__":
    main()
