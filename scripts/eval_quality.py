"""What can still be answered from a compressed context? Accuracy by scorer, budget and keep ratio.

    python scripts/eval_quality.py --model tests/models/tiny-retriever

The context is compressed before any question is read (query-agnostic): each context is sent alone,
then all questions about it start from its compressed prefix, and the run fails unless each of them
did. Tasks are made of the words the tiny test models know, see ``quality_tasks.py``.
Real vLLM, one engine per row and keep ratio. Prints accuracy with a 95 % Wilson interval.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
from local_server import CPU_ENVIRONMENT
from prometheus_client import REGISTRY
from quality_tasks import TASKS, Document
from rich.console import Console
from rich.table import Table

ROWS = ("default", "kvzip", "kvzip+uniform", "keydiff", "window", "streaming", "random")
KEEP_RATIOS = (0.5, 0.3, 0.2, 0.1)
HITS = "vllm_kvzip_prefix_hits_total"


def settings_of(row: str, keep_ratio: float) -> dict[str, Any]:
    """The plugin's settings: ``default``, or a scorer with its default or a named budget."""
    settings: dict[str, Any] = {"keep_ratio": keep_ratio, "min_prompt_tokens": 0}
    if row == "default":
        return settings
    scorer, _, budget = row.partition("+")
    return {**settings, "scorer": scorer, "budget": budget or "adaptive"}


def measure(
    model: str, documents: list[Document], settings: dict[str, Any] | None
) -> tuple[int, int]:
    """Right tokens and all tokens of the answers, in an engine of its own.

    Raises:
        RuntimeError: if a question did not start from a compressed context.
    """
    from vllm import LLM, SamplingParams

    def sampling(num_tokens: int, context: int) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True,
            extra_args={"kvzip_context_tokens": context},
        )  # fmt: skip

    llm = LLM(
        model=model, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3,
        disable_log_stats=True, block_size=32,
        additional_config={} if settings is None else {"kvzip": settings},
    )  # fmt: skip
    lengths = [len(document.tokens) for document in documents]
    before = REGISTRY.get_sample_value(HITS) or 0
    if settings is not None:
        contexts = [{"prompt_token_ids": document.tokens} for document in documents]
        llm.generate(contexts, [sampling(2, n) for n in lengths], use_tqdm=False)
    prompts, limits, answers = [], [], []
    for document, length in zip(documents, lengths, strict=True):
        for question in document.questions:
            prompts.append({"prompt_token_ids": [*document.tokens, *question.tokens]})
            limits.append(sampling(len(question.answer), length))
            answers.append(question.answer)
    results = llm.generate(prompts, limits, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    if settings is not None and (REGISTRY.get_sample_value(HITS) or 0) - before != len(prompts):
        raise RuntimeError(f"not every question started from a compressed context: {settings}")
    outputs = [list(result.outputs[0].token_ids) for result in results]
    right = sum(
        sum(a == b for a, b in zip(output, answer, strict=True))
        for output, answer in zip(outputs, answers, strict=True)
    )
    return right, sum(map(len, answers))


def wilson(right: int, total: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927)."""
    z, share = 1.96, right / total
    middle = share + z * z / (2 * total)
    spread = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return (middle - spread) / scale, (middle + spread) / scale


def draw(path: Path, results: dict[str, dict[str, Any]], full: float) -> None:
    """Accuracy against keep ratio, one line per row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for name, cells in results.items():
        ratios = [float(ratio) for ratio in cells]
        axes.plot(ratios, [cell["accuracy"] for cell in cells.values()], marker="o", label=name)
    axes.axhline(full, color="grey", linestyle=":", label="no compression")
    axes.set(xlabel="keep ratio", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["needle", "multi-key"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="scorer or scorer+budget")
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument("--num-contexts", type=int, default=12, help="of each task")
    parser.add_argument(
        "--questions", type=int, default=24, help="per context, where it has so many"
    )
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument("--plot", type=Path, help="draw them into this PNG; needs matplotlib")
    args = parser.parse_args()
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR", **os.environ})

    import vllm

    rng = np.random.default_rng(args.seed)
    documents = [
        TASKS[task](rng, args.context_tokens, args.questions)
        for task in args.tasks
        for _ in range(args.num_contexts)
    ]
    console = Console(width=110)
    full_right, total = measure(args.model, documents, None)
    full = full_right / total
    title = f"{', '.join(args.tasks)}: {total} answer tokens, contexts of {args.context_tokens}"
    table = Table(title=title)
    for column in ("scorer", *(f"keep {ratio:g}" for ratio in args.keep_ratios)):
        table.add_column(column)
    table.add_row("no compression", *[f"{full:.3f}"] * len(args.keep_ratios))
    results: dict[str, dict[str, Any]] = {}
    with console.status("starting engines") as status:
        for row in args.rows:
            cells = results[row] = {}
            for ratio in args.keep_ratios:
                status.update(f"{row}, keep ratio {ratio:g}")
                right, _ = measure(args.model, documents, settings_of(row, ratio))
                low, high = wilson(right, total)
                cells[f"{ratio:g}"] = {"accuracy": right / total, "interval": [low, high]}
            shown = [
                f"{c['accuracy']:.3f} [{c['interval'][0]:.2f} {c['interval'][1]:.2f}]"
                for c in cells.values()
            ]
            table.add_row(row, *shown)
    console.print(table)
    console.print(
        f"vLLM {vllm.__version__}, {platform.machine()} {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {date.today().isoformat()}"
    )
    if args.json:
        args.json.write_text(json.dumps({"no compression": full, **results}, indent=2) + "\n")
    if args.plot:
        draw(args.plot, results, full)
    sys.stdout.flush()


if __name__ == "__main__":
    main()
