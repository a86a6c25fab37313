"""What do whole-page head budgets cost against token-exact selection? Accuracy by page size.

    python scripts/eval_page_size.py --model MODEL

A plain transformers experiment, because vLLM cannot run every page size everywhere. Every KV pair
of a context is scored as scorer ``kvzip`` does. For each budget, page size and keep ratio the same
functions as in the engine decide how many pages there are, how they are shared and which tokens
fill them; then every question is answered greedily while each head sees its kept KV pairs only,
tokens behind the boundary, and the question. Page size 1 is token-exact selection. "lost" are nats
a token of the right answers, read as if they had been given, beyond those of no compression.

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
import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from vllm_kvzip.budgeting.budgets import allocate_adaptive, allocate_uniform
from vllm_kvzip.budgeting.selection import rank, select
from vllm_kvzip.config import KVzipConfig
from vllm_kvzip.errors import ConfigError, KVzipError
from vllm_kvzip.evaluation.intervals import accuracy, interval
from vllm_kvzip.evaluation.model_files import repeat_ids
from vllm_kvzip.evaluation.tasks import word_tasks
from vllm_kvzip.evaluation.tasks.quality_documents import ALL_TASKS, make_documents, settle_tasks
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.profiling.masked_model import MaskedModel
from vllm_kvzip.profiling.suitable_models import refuse_unsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.evaluation.tasks.documents import Document

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
        _, plan = self.plan(num_tokens)
        if plan is None:
            return None
        boundary = plan.boundary_tokens
        sinks, recent = plan.num_sink_tokens, plan.num_recent_tokens
        scores = scores[:, :, :boundary]
        ranking = rank(scores, sinks, recent)
        total = plan.num_compressed_blocks * num_layers * num_heads
        if self.budget == "uniform":
            pages = allocate_uniform(total, num_layers, num_heads)
        else:
            pages = allocate_adaptive(
                ranking.scores, total, self.page_size, plan.min_pages_per_head,
                per_layer=self.budget == "adaptive-per-layer",
            )  # fmt: skip
        keep = select(scores, pages, self.page_size, sinks, recent)
        kept = torch.zeros(num_layers * num_heads, boundary, dtype=torch.bool)
        heads = torch.arange(len(kept)).repeat_interleave(pages.flatten())
        kept[heads[:, None], keep.positions] = True
        return kept.view(scores.shape)


def load_model(args: argparse.Namespace) -> MaskedModel:
    """The model; sets the tasks and questions that were not named to what suits it.

    Raises:
        KVzipError: if it cannot be loaded or does not know the words of the tasks.
    """
    path = args.model
    try:
        if not Path(path).is_dir():
            raise FileNotFoundError("there is no such folder.")
        config = AutoConfig.from_pretrained(path).get_text_config()
        refuse_unsupported(path, config, args.context_tokens)
        settle_tasks(args, config.vocab_size, answered=True)
        return MaskedModel(path)
    except KVzipError:
        raise
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--model {path} cannot be loaded: {reason}") from error


def load_documents(args: argparse.Namespace) -> list[Document]:
    """Contexts and questions of every task.

    Raises:
        ConfigError: if the text is too short or cannot be read, or a task has no reference answer.
    """
    word_tasks.FACT_DENSITY = args.fact_density
    documents = make_documents(
        args.model, args.tasks, num_contexts=args.num_contexts, context_tokens=args.context_tokens,
        questions=args.questions, seed=args.seed, text=args.text,
    )  # fmt: skip
    for task, document in documents:
        if not all(question.scored_places for question in document.questions):
            raise ConfigError(f"--tasks {task} has no right answer, which this experiment needs.")
    return [document for _, document in documents]


@dataclass
class Answered:
    """What came of one cell, or of no compression.

    Attributes:
        counts: right and all answers of each context, or answer tokens; see ``documents.Question``.
        nats: negative log-likelihood of the right answers' scored tokens.
        num_tokens: how many tokens those are.
    """

    counts: list[tuple[int, int]]
    nats: float = 0.0
    num_tokens: int = 0

    def add(
        self, model: MaskedModel, document: Document, cache: Any, kept: torch.Tensor | None
    ) -> None:
        """Ask all questions about one context; see :meth:`MaskedModel.answer`."""
        answers = model.answer(document, cache, kept)
        pairs = [q.right(answer) for q, answer in zip(document.questions, answers, strict=True)]
        self.counts.append((sum(right for right, _ in pairs), sum(count for _, count in pairs)))
        nats, num_tokens = model.nats(document, cache, kept)
        self.nats += nats
        self.num_tokens += num_tokens

    @property
    def mean_nats(self) -> float:
        """Nats a token."""
        return self.nats / self.num_tokens


def evaluate(
    model: MaskedModel, documents: list[Document], cells: list[Cell],
    prompts: list[list[int]], chunk_tokens: int, progress: Callable[[str], Any],
) -> tuple[dict[Cell | None, Answered], dict[Cell, torch.Tensor]]:  # fmt: skip
    """Answer all questions from what each cell keeps.

    Args:
        model: what answers.
        documents: contexts and questions.
        cells: what to try.
        prompts: token ids of the first and later repeat prompts.
        chunk_tokens: tokens repeated at once.
        progress: called with one line of text now and then.

    Returns:
        What was answered by cell, None being no compression; and float ``[L, H]`` by cell, the mean
        share of the context's KV pairs that each head keeps.
    """
    answered: dict[Cell | None, Answered] = {cell: Answered([]) for cell in (None, *cells)}
    shares: dict[Cell, torch.Tensor] = {}
    for number, document in enumerate(documents, 1):
        progress(f"context {number} of {len(documents)}")
        cache = model.read(document.tokens)
        first, later = prompts
        scores = model.score(document.tokens, chunk_tokens, first, later, local=True, cache=cache)
        answered[None].add(model, document, cache, None)
        for cell in cells:
            kept = cell.kept_pairs(scores)
            answered[cell].add(model, document, cache, kept)
            share = torch.ones(scores.shape[:2]) if kept is None else kept.float().mean(dim=-1)
            shares[cell] = shares.get(cell, 0) + share / len(documents)
    return answered, shares


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
            text = f"{result['accuracy']:.3f} [{low:.2f} {high:.2f}]"
            if "held" in result:
                text += f"\nlost {result['lost']:z.3f}, {result['held']:.1%} held"
            texts.append(text)
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
        image = axes.imshow(shares.numpy(), vmin=0, vmax=1, aspect="auto", cmap="viridis")
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
        value = getattr(args, name)
        if value is not None and value < least:
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
    density = word_tasks.FACT_DENSITY
    parser.add_argument("--model", required=True, help="folder of a model in transformers' format")
    parser.add_argument(
        "--tasks", nargs="+", choices=ALL_TASKS, help="default: what suits the model"
    )
    parser.add_argument("--text", nargs="+", help="files that contexts are cut from")
    parser.add_argument("--keep-ratios", nargs="+", type=float, default=list(KEEP_RATIOS))
    parser.add_argument("--page-sizes", nargs="+", type=int, default=list(PAGE_SIZES))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--num-contexts", type=int, default=12, help="of each task")
    parser.add_argument("--questions", type=int, help="per context; default 3, of words 24")
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
        model = load_model(args)
        documents = load_documents(args)
    except KVzipError as error:
        print(f"eval_page_size: error: {error}", file=sys.stderr)
        return 2
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
        answered, shares = evaluate(
            model, documents, cells, prompts, args.chunk_tokens, status.update
        )
    total = sum(n for _, n in answered[None].counts)

    def result(cell: Cell | None) -> dict[str, Any]:
        found = answered[cell]
        values = {"accuracy": accuracy(found.counts), "interval": interval(found.counts)}
        if cell is None:
            return {**values, "nats": found.mean_nats}
        lost = found.mean_nats - answered[None].mean_nats
        return {**values, "lost": lost, "held": float(shares[cell].mean())}

    full = {f"{ratio:g}": result(None) for ratio in args.keep_ratios}
    results: dict[str, dict[str, dict[str, Any]]] = {budget: {} for budget in args.budgets}
    for cell in grid:
        row = results[cell.budget].setdefault(str(cell.page_size), {})
        row[f"{cell.keep_ratio:g}"] = result(cell)
    title = (
        f"{', '.join(args.tasks)}: {total} answers or answer tokens, contexts of "
        f"{args.context_tokens}, {answered[None].mean_nats:z.3f} nats without compression"
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
            f"{budget}: {accuracy(answered[cell].counts):.3f} right": shares[cell]
            for budget, cell in drawn.items()
        }
        draw(args.heat_map, panels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
