"""Numbers and pictures of ``compare_kvpress.py``: cells, rank correlation, tables, plot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from benchmarks.kvpress_venv import METHODS
from vllm_kvzip.evaluation.intervals import Counts, accuracy, interval

if TYPE_CHECKING:
    from pathlib import Path

Rows = dict[str, dict[str, dict[str, Any]]]  # method -> keep ratio -> see ``cell``


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Rank correlation of two arrays of one shape; equal values share their mean rank."""
    return float(np.corrcoef(_ranks(first), _ranks(second))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, float64 ``[n]``."""
    _, which, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[which]


def cell(counts: Counts, held: float, kept: float) -> dict[str, Any]:
    """One cell: accuracy, its interval, and shares of the uncompressed cache's bytes."""
    shares = {"held": held, "kept": kept}
    return {"accuracy": accuracy(counts), "interval": interval(counts), **shares}


def kvpress_rows(result: dict[str, Any], columns: list[str]) -> tuple[dict[str, Any], Rows]:
    """The uncompressed cell and the rows of ``kvpress_job.py``'s result."""
    none = result["cells"].pop("none")["all"]

    def of(found: dict[str, Any]) -> dict[str, Any]:
        names = ("held_bytes", "kept_bytes", "held_before_decode_bytes")
        held, kept, at_first = (found[name] / none[name] for name in names)
        return {**cell(found["answers"], held, kept), "held_before_decode": at_first}

    rows = {
        f"kvpress: {METHODS[method]}": {column: of(found[column]) for column in columns}
        for method, found in result["cells"].items()
    }
    return of(none), rows


def score_agreement(
    model: str, tokens: list[int], ids: list[list[int]], chunk_tokens: int, theirs: np.ndarray
) -> dict[str, list[float]]:
    """Rank correlation of kvpress's KVzip scores with ours, over all layers and then by layer.

    Ours are taken twice: as the engine does, which repeats a chunk looking at sinks and chunk
    only, and looking at the whole context, as kvpress does.

    Args:
        theirs: float32 ``[L, H, T]``.
    """
    from vllm_kvzip.profiling.reconstruction_probe import ReconstructionProbe

    probe = ReconstructionProbe(model)
    found = {}
    for name, local in (("as our engine scores", True), ("whole context in view", False)):
        first, later = ids
        scores = probe.score(tokens, chunk_tokens, first, later, local=local).numpy()
        layers = [spearman(a, b) for a, b in zip(scores, theirs, strict=True)]
        found[name] = [spearman(scores, theirs), *layers]
    return found


def accuracy_table(title: str, columns: list[str], rows: Rows) -> Table:
    """Accuracy of every row; the last column is for the last keep ratio."""
    table = Table(title=title)
    for column in ("", *(f"keep {column}" for column in columns), f"held at {columns[-1]}"):
        table.add_column(column)
    for name, cells in rows.items():
        shown = [
            f"{c['accuracy']:.3f} [{c['interval'][0]:z.2f} {c['interval'][1]:.2f}]"
            for c in (cells[column] for column in columns)
        ]
        table.add_row(name, *shown, f"{cells[columns[-1]]['held']:.3f}")
    return table


def agreement_table(found: dict[str, list[float]]) -> Table:
    """See ``score_agreement``."""
    table = Table(title="rank correlation of KVzip's scores, kvpress and ours, first context")
    layers = range(len(next(iter(found.values()))) - 1)
    for column in ("ours", "all layers", *(f"layer {layer}" for layer in layers)):
        table.add_column(column)
    for name, values in found.items():
        table.add_row(name, *(f"{value:.3f}" for value in values))
    return table


def draw(path: Path, rows: Rows) -> None:
    """Accuracy against keep ratio: kvpress dashed, ours solid."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, cells in rows.items():
        line = "--" if name.startswith("kvpress") else "-"
        ratios = [float(column) for column in cells]
        accuracies = [found["accuracy"] for found in cells.values()]
        axes.plot(ratios, accuracies, line, marker="o", label=name)
    axes.set(xlabel="keep ratio", ylabel="accuracy", ylim=(0, 1.02))
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
