"""What the evaluation scripts share: an engine, intervals, the table, the plot, the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import date
from math import sqrt
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table
    from vllm import LLM

BLOCK_SIZE = 32  # what the plugin chooses on the CPU

Counts = Sequence[tuple[int, int]]  # right and all answer tokens of each context


def start_engine(
    model: str, settings: dict[str, Any] | None, num_ranks: int = 1, dtype: str = "float32"
) -> LLM:
    """A small engine, with the plugin's settings or, when they are None, without compression.

    Args:
        model: its folder.
        settings: see above.
        num_ranks: tensor-parallel processes.
        dtype: of the model and its KV cache.
    """
    from vllm import LLM

    return LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        gpu_memory_utilization=0.3,
        disable_log_stats=True,
        block_size=BLOCK_SIZE,
        tensor_parallel_size=num_ranks,
        additional_config={} if settings is None else {"kvzip": settings},
    )


def counter(name: str, **labels: str) -> float:
    """A metric of this process's engines, over all of them."""
    return REGISTRY.get_sample_value(f"vllm_kvzip_{name}", labels) or 0.0


def accuracy(counts: Counts) -> float:
    """Right answer tokens / all of them."""
    return sum(right for right, _ in counts) / sum(total for _, total in counts)


def interval(counts: Counts) -> tuple[float, float]:
    """95 % interval of a share whose answers come in clusters, one per context.

    Wilson's interval (1927) for as many independent answers as have the same variance: answers
    about one context stand or fall together (design effect, Kish 1965).
    """
    total = sum(n for _, n in counts)
    mean = accuracy(counts)
    effective = float(total)
    if 0 < mean < 1 and len(counts) > 1:
        spread = sum((right - mean * n) ** 2 for right, n in counts) / total**2
        variance = spread * len(counts) / (len(counts) - 1)
        effective = min(effective, mean * (1 - mean) / max(variance, 1e-12))
    z = 1.96
    middle = mean + z * z / (2 * effective)
    half = z * sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2))
    scale = 1 + z * z / effective
    return (middle - half) / scale, (middle + half) / scale


def cell(counts: Counts, held: float | None = None) -> dict[str, Any]:
    """Accuracy and interval, for the table and for JSON.

    Args:
        counts: see :data:`Counts`.
        held: bytes held / bytes before; None: not measured.
    """
    found: dict[str, Any] = {"accuracy": accuracy(counts), "interval": list(interval(counts))}
    return found if held is None else {**found, "held": held, "counts": [list(c) for c in counts]}


def accuracy_table(title: str, columns: dict[str, str], rows: dict[str, dict[str, Any]]) -> Table:
    """One row per name, one column per keep ratio; a cell may be missing.

    Args:
        title: of the table.
        columns: key of a cell, such as a keep ratio as text -> its heading.
        rows: name -> key -> :func:`cell`; says how much is held where that was measured.
    """
    from rich.table import Table

    table = Table(title=title)
    for column in ("scorer", *columns.values()):
        table.add_column(column)
    for name, cells in rows.items():
        table.add_row(name, *(_shown(cells.get(key)) for key in columns))
    return table


def _shown(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    low, high = found["interval"]
    text = f"{found['accuracy']:.3f} [{low:.2f} {high:.2f}]"
    return f"{text}\n({found['held']:.3f} held)" if "held" in found else text


def curve(cells: dict[str, dict[str, Any]]) -> list[tuple[float, float]]:
    """Points of a row's line: how much is kept, or is held where that was measured, and accuracy.

    Args:
        cells: keep ratio as text -> :func:`cell`.
    """
    return sorted(
        (found["held"] if "held" in found else float(key), found["accuracy"])
        for key, found in cells.items()
    )


def draw(path: Path, rows: dict[str, dict[str, Any]]) -> None:
    """Accuracy against keep ratio, one line per row, into a PNG; or against bytes, as measured.

    Args:
        path: of the PNG.
        rows: see :func:`accuracy_table`.
    """
    from matplotlib.figure import Figure

    by_bytes = any("held" in found for cells in rows.values() for found in cells.values())
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, cells in rows.items():
        shares, accuracies = zip(*curve(cells), strict=True)
        axes.plot(shares, accuracies, marker="o", markersize=3, label=name)
    axes.set(xlabel="keep ratio", ylabel="accuracy", ylim=(0, 1.02))
    if by_bytes:
        axes.set_xlabel("bytes held / bytes before")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def versions() -> str:
    """Machine, versions and date, the last line of every table."""
    import torch
    import vllm

    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{card}vLLM {vllm.__version__}, {platform.machine()} {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {date.today().isoformat()}"
    )
