"""What do whole-page head budgets cost against token-exact selection? Accuracy by page size.

    python scripts/eval_page_size.py --model tests/models/tiny-retriever

A plain transformers experiment, because vLLM cannot run every page size everywhere. Every KV pair
of a context is scored as scorer ``kvzip`` does. For each budget, page size and keep ratio the same
functions as in the engine decide how many pages there are, how they are shared and which tokens
fill them; then every question is answered greedily while each head sees its kept KV pairs only,
tokens behind the boundary, and the question. Page size 1 is token-exact selection.

Whole pages are rounded up, so each cell also says which share of the KV pairs is really held.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import quality_tasks
import torch
import transformers
from evaluation import Counts, accuracy, interval
from masked_model import MaskedModel
from model_files import repeat_ids
from profile_heads import refuse_unsupported
from retrieval_task import BASIC_VOCABULARY_SIZE, VOCABULARY
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from vllm_kvzip.budgeting import allocate_adaptive, allocate_uniform
from vllm_kvzip.config import KVzipConfig
from vllm_kvzip.errors import ConfigError, KVzipError
from vllm_kvzip.prefix_rule import PrefixRule
from vllm_kvzip.request_options import RequestOptions
from vllm_kvzip.selection import protect, select

if TYPE_CHECKING:
    from collections.abc import Callable

    from documents import Document

    from vllm_kvzip.core import PrefixPlan

BUDGETS = ("adaptive", "adaptive-per-layer", "uniform")
KEEP_RATIOS = (0.5, 0.3, 0.2, 0.1)
PAGE_SIZES = (1, 16, 32, 64, 128)
HEAT_MAP_KEEP_RATIO, HEAT_MAP_PAGE_SIZE = 0.2, 32
DEFAULTS = KVzipConfig()


@dataclass(frozen=True)
class Cell:
    """One cell of the tables."""

    budget: str
    page_size: int
    keep_ratio: float

    def plan(self, num_tokens: int) -> tuple[PrefixRule, PrefixPlan | None]:
        """The engine's rule and its plan for a context; None when it leaves the context alone."""
        rule = PrefixRule(
            keep_ratio=self.keep_ratio,
            min_prompt_tokens=0,
            sink_tokens=DEFAULTS.sink_tokens,
            recent_tokens=DEFAULTS.recent_tokens,
            block_size=self.page_size,
        )
        return rule, rule.plan(num_tokens, RequestOptions(num_tokens))

    def kept_pairs(self, scores: torch.Tensor) -> torch.Tensor | None:
        """Which KV pairs each head keeps.

        Args:
            scores: float32 ``[L, H, T]``, of all T tokens of a context.

        Returns:
            bool ``[L, H, boundary]``, or None when the engine leaves the context alone.
        """
        num_layers, num_heads, num_tokens = scores.shape
        rule, plan = self.plan(num_tokens)
        if plan is None:
            return None
        boundary = plan.boundary_tokens
        sinks, recent = rule.protected_in_prefix(boundary)
        scores = scores[:, :, :boundary]
        ranked = protect(scores, sinks, recent)
        total = plan.num_compressed_blocks * num_layers * num_heads
        if self.budget == "uniform":
            pages = allocate_uniform(total, num_layers, num_heads)
        else:
            pages = allocate_adaptive(
                ranked, total, self.page_size, rule.min_pages_per_head(boundary),
                per_layer=self.budget == "adaptive-per-layer",
            )  # fmt: skip
        keep = select(scores, pages, self.page_size, sinks, recent)
        kept = torch.zeros(num_layers * num_heads, boundary, dtype=torch.bool)
        kept[torch.arange(len(kept)).repeat_interleave(keep.offsets.diff()), keep.positions] = True
        return kept.view(scores.shape)


def load_model(path: str, tasks: list[str]) -> MaskedModel:
    """The model.

    Raises:
        KVzipError: if it cannot be loaded or does not know the words of the tasks.
    """
    try:
        if not Path(path).is_dir():
            raise FileNotFoundError("there is no such folder.")
        config = AutoConfig.from_pretrained(path).get_text_config()
        refuse_unsupported(path, config)
        if config.vocab_size not in (BASIC_VOCABULARY_SIZE, len(VOCABULARY.words)):
            raise ConfigError(
                f"--model {path} is not of scripts/train_tiny_model.py, whose words the tasks use."
            )
        if unknown := set(tasks) - set(quality_tasks.known_tasks(config.vocab_size)):
            raise ConfigError(f"--model {path} was not trained on the task {min(unknown)}.")
        return MaskedModel(path)
    except KVzipError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--model {path} cannot be loaded: {reason}") from error


def make_documents(args: argparse.Namespace) -> list[Document]:
    """Contexts and questions of every task."""
    rng = np.random.default_rng(args.seed)
    quality_tasks.FACT_DENSITY = args.fact_density
    return [
        quality_tasks.TASKS[task](rng, args.context_tokens, args.questions)
        for task in args.tasks
        for _ in range(args.num_contexts)
    ]


def count_right(answers: list[list[int]], document: Document) -> tuple[int, int]:
    """Right answer tokens, by position, and all of them."""
    hits = np.array(answers) == np.array([question.answer for question in document.questions])
    return int(hits.sum()), hits.size


def evaluate(
    model: MaskedModel, documents: list[Document], cells: list[Cell],
    prompts: list[list[int]], chunk_tokens: int, progress: Callable[[str], Any],
) -> tuple[dict[Cell | None, Counts], dict[Cell, torch.Tensor]]:  # fmt: skip
    """Answer all questions from what each cell keeps.

    Args:
        model: what answers.
        documents: contexts and questions.
        cells: what to try.
        prompts: token ids of the first and later repeat prompts.
        chunk_tokens: tokens repeated at once.
        progress: called with one line of text now and then.

    Returns:
        Right and all answer tokens of each context by cell, None being no compression; and float
        ``[L, H]`` by cell, the mean share of the context's KV pairs that each head keeps.
    """
    counts: dict[Cell | None, list[tuple[int, int]]] = {None: [], **{c: [] for c in cells}}
    shares: dict[Cell, torch.Tensor] = {}
    for number, document in enumerate(documents, 1):
        progress(f"context {number} of {len(documents)}")
        cache = model.read(document.tokens)
        scores = model.score(document.tokens, chunk_tokens, *prompts, local=True, cache=cache)
        counts[None].append(count_right(model.answer(document, cache, None), document))
        for cell in cells:
            kept = cell.kept_pairs(scores)
            counts[cell].append(count_right(model.answer(document, cache, kept), document))
            share = torch.ones(scores.shape[:2]) if kept is None else kept.float().mean(dim=-1)
            shares[cell] = shares.get(cell, 0) + share / len(documents)
    return counts, shares


def show(console: Console, budget: str, title: str, shown: dict[str, dict[str, Any]]) -> None:
    """Print the table of one budget; ``shown`` is page size -> keep ratio -> result."""
    table = Table(title=f"budget {budget}: {title}")
    ratios = list(next(iter(shown.values())))
    for column in ("page size", *(f"keep {ratio}" for ratio in ratios)):
        table.add_column(column)
    for page_size, results in shown.items():
        texts = []
        for result in results.values():
            low, high = result["interval"]
            held = f", {result['held']:.1%} held" if "held" in result else ""
            texts.append(f"{result['accuracy']:.3f} [{low:.2f} {high:.2f}]{held}")
        table.add_row("tokens" if page_size == "1" else page_size, *texts)
    console.print(table)


def draw(path: Path, panels: dict[str, torch.Tensor]) -> None:
    """Layers x KV heads, ``[L, H]`` per panel, with the numbers in the cells where they fit."""
    from matplotlib.figure import Figure

    num_layers, num_heads = next(iter(panels.values())).shape
    size = (1 + len(panels) * max(2.4, 0.55 * num_heads), max(2.6, 0.45 * num_layers + 1.2))
    figure = Figure(figsize=size, layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, shares) in zip(all_axes, panels.items(), strict=True):
        image = axes.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axes.set(title=title, xlabel="KV head", xticks=range(num_heads), yticks=range(num_layers))
        for (layer, head), share in np.ndenumerate(shares.numpy()):
            color = "black" if share > 0.6 else "white"
            axes.text(head, layer, f"{share:.2f}", ha="center", va="center", color=color)
    all_axes[0].set_ylabel("layer")
    figure.colorbar(image, ax=list(all_axes), label="share of its KV pairs a head keeps")
    figure.suptitle(f"keep ratio {HEAT_MAP_KEEP_RATIO}, pages of {HEAT_MAP_PAGE_SIZE} tokens")
    figure.savefig(path, dpi=120)


def check(args: argparse.Namespace) -> None:
    """Find wrong arguments before the long work.

    Raises:
        ConfigError: names the argument.
    """
    limits = {"context_tokens": 64, "num_contexts": 1, "questions": 1, "chunk_tokens": 1}
    for name, least in limits.items():
        if getattr(args, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}.")
    if not all(0 < ratio <= 1 for ratio in args.keep_ratios):
        raise ConfigError("--keep-ratios must be above 0 and at most 1.")
    if not all(1 <= size <= args.context_tokens for size in args.page_sizes):
        raise ConfigError(f"--page-sizes must be 1 to {args.context_tokens} (--context-tokens).")
    if not 0 < args.fact_density <= 1:
        raise ConfigError("--fact-density must be above 0 and at most 1.")
    for path in filter(None, (args.json, args.heat_map)):
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(f"{path} cannot be written; name a file in a folder that exists.")
    if args.heat_map and find_spec("matplotlib") is None:
        raise ConfigError("--heat-map needs matplotlib; install it or leave the option out.")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tasks = list(quality_tasks.TASKS)
    density = quality_tasks.FACT_DENSITY
    parser.add_argument("--model", required=True, help="folder of a model in transformers' format")
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=["needle", "multi-key"])
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument("--page-sizes", nargs="+", type=int, default=list(PAGE_SIZES))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--num-contexts", type=int, default=12, help="of each task")
    parser.add_argument("--questions", type=int, default=24, help="per context, if it has so many")
    parser.add_argument("--context-tokens", type=int, default=1024)
    parser.add_argument(
        "--fact-density", type=float, default=density, help="share of tokens in facts, of multi-key"
    )
    parser.add_argument("--repeat-prompt", help="default: that of the model's head profile")
    parser.add_argument(
        "--chunk-tokens", type=int, default=DEFAULTS.scoring_chunk_tokens, help="repeated at once"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the results here as well")
    parser.add_argument(
        "--heat-map", type=Path, help="draw what each head keeps into this PNG; needs matplotlib"
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit code."""
    args = parse_args(argv)
    try:
        check(args)
        model = load_model(args.model, args.tasks)
    except KVzipError as error:
        print(f"eval_page_size: error: {error}", file=sys.stderr)
        return 2
    documents = make_documents(args)
    drawn = {b: Cell(b, HEAT_MAP_PAGE_SIZE, HEAT_MAP_KEEP_RATIO) for b in BUDGETS}
    grid = [
        Cell(budget, page_size, ratio)
        for budget in args.budgets
        for page_size in args.page_sizes
        for ratio in args.keep_ratios
    ]
    console = Console(width=max(110, 20 + 31 * len(args.keep_ratios)))
    with console.status("reading the contexts") as status:
        cells = list(dict.fromkeys([*grid, *(drawn.values() if args.heat_map else ())]))
        prompts = repeat_ids(args.model, model.fingerprint, args.repeat_prompt)
        counts, shares = evaluate(
            model, documents, cells, prompts, args.chunk_tokens, status.update
        )
    total = sum(n for _, n in counts[None])

    def result(cell: Cell | None) -> dict[str, Any]:
        values = {"accuracy": accuracy(counts[cell]), "interval": interval(counts[cell])}
        return values if cell is None else {**values, "held": float(shares[cell].mean())}

    full = {f"{ratio:g}": result(None) for ratio in args.keep_ratios}
    results: dict[str, dict[str, dict[str, Any]]] = {budget: {} for budget in args.budgets}
    for cell in grid:
        row = results[cell.budget].setdefault(str(cell.page_size), {})
        row[f"{cell.keep_ratio:g}"] = result(cell)
    title = (
        f"{', '.join(args.tasks)}: {total} answer tokens, contexts of {args.context_tokens}, "
        f"fact density {args.fact_density:g}"
    )
    for budget, rows in results.items():
        show(console, budget, title, {"no compression": full, **rows})
    console.print(
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()} {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {date.today().isoformat()}"
    )
    if args.json:
        values = {"no compression": result(None), **results}
        args.json.write_text(json.dumps(values, indent=2) + "\n")
    if args.heat_map:
        panels = {
            f"{budget}: {accuracy(counts[cell]):.3f} right": shares[cell]
            for budget, cell in drawn.items()
        }
        draw(args.heat_map, panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
