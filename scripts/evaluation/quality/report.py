"""Table, plot and recommendation of ``vllm-kvzip evaluate``."""

from __future__ import annotations

from dataclasses import asdict
from statistics import mean
from typing import TYPE_CHECKING, Any

from vllm_kvzip.evaluation.intervals import accuracy, interval, rank_correlation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from rich.table import Table

    from vllm_kvzip.evaluation.intervals import Estimate
    from vllm_kvzip.evaluation.quality.metrics import Measured

Cells = dict[str, dict[str, Any]]  # keep ratio as text -> :func:`cell`


def cell(found: Measured, full: Measured) -> dict[str, Any]:
    """What a run found, for the table and for JSON.

    Args:
        found: at one keep ratio.
        full: over the same documents without compression; may be the same object.

    Returns:
        ``held`` (bytes held / bytes before) and, where they were measured, ``accuracy`` with
        ``interval`` and ``counts``; ``nats`` (negative log-likelihood of an answer's token),
        ``lost`` (how much higher than ``full``), ``kl`` and ``same``, each a mean with its 95 %
        interval; where a quality loss decided, ``estimated`` (the mean of the estimates) and
        ``most_held`` (the most that a context held).
    """
    shown: dict[str, Any] = {"held": found.held}
    if found.estimates:
        shown["estimated"] = mean(found.estimates)
        shown["most_held"] = max(after / before for after, before in found.blocks)
    counts = [pair for pair in found.counts if pair[1]]
    if counts:
        shown |= {"accuracy": accuracy(counts), "interval": list(interval(counts))}
        shown["counts"] = [list(pair) for pair in found.counts]
    measured = {
        "nats": found.mean_nats(),
        "lost": None if found is full else found.lost_nats(full),
        "kl": found.divergence(),
        "same": found.same_share(),
    }
    return shown | {name: _plain(value) for name, value in measured.items() if value is not None}


def _plain(value: Estimate) -> dict[str, float | None]:
    """For JSON, which knows no infinity: that of a single context has no interval."""
    return {
        name: each if abs(each) < float("inf") else None for name, each in asdict(value).items()
    }


def quality_table(title: str, columns: dict[str, str], rows: dict[str, Cells]) -> Table:
    """One row per name, one column per keep ratio; a cell may be missing.

    Args:
        title: of the table.
        columns: key of a cell, such as a keep ratio as text -> its heading.
        rows: name -> cells.
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
    lines = []
    if "accuracy" in found:
        low, high = found["interval"]
        lines.append(f"{found['accuracy']:.3f} [{low:.2f} {high:.2f}]")
    if "lost" in found:
        lines.append(f"lost {_estimate(found['lost'])}")
    elif "nats" in found:
        lines.append(f"nats {_estimate(found['nats'])}")
    if "kl" in found:
        lines.append(f"KL {found['kl']['mean']:.3f}, {found['same']['mean']:.3f} same")
    if "estimated" in found:
        lines.append(f"estimated {found['estimated']:.3f}")
    most = f", up to {found['most_held']:.3f}" if "most_held" in found else ""
    return "\n".join([*lines, f"({found['held']:.3f} held{most})"])


def promise_kept(cells: Mapping[str, Measured]) -> str:
    """How well estimated losses foretell the distance (KL) that is measured; "" without estimates.

    Args:
        cells: quality loss -> what was found with it.
    """
    pairs = [
        (estimate, kl / tokens)
        for found in cells.values()
        for estimate, (kl, tokens) in zip(found.estimates, found.divergences, strict=False)
        if tokens
    ]
    if not pairs:
        return ""
    estimated, measured = zip(*pairs, strict=True)
    correlation = rank_correlation(estimated, measured)
    return (
        f"Estimated against measured loss (KL) of {len(pairs)} compressed contexts: rank "
        f"correlation {correlation:.2f}, mean estimate {mean(estimated):.3f}, mean measured "
        f"{mean(measured):.3f}, bias {mean(estimated) - mean(measured):+.3f} nats a token."
    )


def _estimate(value: dict[str, float | None]) -> str:
    if value["low"] is None:
        return f"{value['mean']:.3f}"
    return f"{value['mean']:.3f} [{value['low']:.2f} {value['high']:.2f}]"


def loss(found: dict[str, Any]) -> float | None:
    """Nats lost a token of the answers, else, without any, KL a token; None: neither measured."""
    for name in ("lost", "kl"):
        if name in found:
            return float(found[name]["mean"])
    return None


def curve(cells: Cells) -> list[tuple[float, float]]:
    """Points of a row's line, by bytes held: the loss, or where it was not measured, accuracy."""
    points = []
    for found in cells.values():
        value = loss(found)
        value = found.get("accuracy") if value is None else value
        if value is not None:
            points.append((found["held"], value))
    return sorted(points)


def draw(path: Path, rows: dict[str, Cells]) -> None:
    """Loss against bytes held, as measured, one line per row, into a PNG; else accuracy.

    Args:
        path: of the PNG.
        rows: name -> cells.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    found = [each for cells in rows.values() for each in cells.values()]
    has_loss = any(loss(each) is not None for each in found)
    for name, cells in rows.items():
        chosen = {k: v for k, v in cells.items() if not has_loss or loss(v) is not None}
        if points := curve(chosen):
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel="bytes held / bytes before", ylabel="nats lost" if has_loss else "accuracy")
    if not has_loss:
        axes.set_ylim(0, 1.02)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)


def recommend(
    rows: dict[str, Cells], settings: dict[str, dict[str, dict[str, Any]]], max_loss: float
) -> str:
    """The smallest cache within a loss, as flags to serve with; one sentence where there is none.

    Args:
        rows: name -> cells.
        settings: the plugin's of each cell, by the same keys; rows without any are not compressed.
        max_loss: nats a token; see :func:`loss`.
    """
    found = [
        (cells[key]["held"], lost, name, key)
        for name, cells in rows.items()
        for key in cells
        if key in settings.get(name, {})
        and (lost := loss(cells[key])) is not None
        and lost <= max_loss
    ]
    if not found:
        return f"Nothing that was tried loses at most {max_loss:g} nats a token."
    held, lost, name, key = min(found)
    return (
        f"Smallest cache that loses at most {max_loss:g} nats a token: {name}, {held:.3f} of the "
        f"bytes, {lost:.3f} nats lost. Serve with:\n{serve_flags(settings[name][key])}"
    )


def serve_flags(settings: dict[str, Any]) -> str:
    """Flags of ``vllm serve`` for the plugin's settings.

    ``min_prompt_tokens`` is left to its default: it says what is too short to bother, and the
    evaluation compresses everything.
    """
    flags = ["--kv-compression kvzip"]
    for name, value in settings.items():
        if name != "min_prompt_tokens":
            flags.append(f"--kv-compression-config.{name}={value}")
    return " ".join(flags)
