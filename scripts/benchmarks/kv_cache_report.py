"""From the raw figures of the engines to medians, the tables, and the plots.

A variant's *run* is what :func:`kv_cache_run.run_variant` returns, one per round; its *row* has the
medians over the rounds. Ratios to stock vLLM are taken within a round, where both met the same
machine.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.step_profile import PARTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Run = dict[str, Any]
Row = dict[str, Any]

STOCK = "stock"
MIB = 2**20
TIME_SPANS = 50  # of the longest run, in the plot
HEADINGS = (
    "variant",
    "tokens/s",
    "/ stock",
    "total (s)",
    "first token (s): median",
    "p99",
    "per token (ms): median",
    "p99",
    "running: peak",
    "mean",
    "mean / stock",
    "preempted",
    "KV held (MiB): peak",
    "mean",
    "compression / prefill",
    "blocks freed",
)


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated percentile, so that ``percent`` 50 is the median.

    Args:
        values: at least one.
        percent: in [0, 100].
    """
    return float(np.percentile(values, percent))


def prefill_seconds(run: Run) -> float:
    """What reading the prompts cost: the time by which steps that read some exceed a decode step.

    Compression runs at the start of a step, and where prompts wait that step reads another one, so
    its time is taken out.
    """
    decoding = run["prefill_steps"] * run["decode_step_seconds"]
    compressing = run["plugin"]["compress_seconds"]
    return max(0.0, float(run["prefill_steps_seconds"] - decoding - compressing))


def figures(run: Run) -> dict[str, float]:
    """The figures of one run that the table shows, seconds and bytes as they are."""
    plugin = run["plugin"]
    prefill = prefill_seconds(run)
    return {
        "tokens_per_second": run["output_tokens"] / run["total_seconds"],
        "total_seconds": run["total_seconds"],
        "ttft_median_seconds": percentile(run["ttft_seconds"], 50),
        "ttft_p99_seconds": percentile(run["ttft_seconds"], 99),
        "tpot_median_seconds": percentile(run["tpot_seconds"], 50),
        "tpot_p99_seconds": percentile(run["tpot_seconds"], 99),
        "running_peak": run["running_peak"],
        "running_mean": run["running_mean"],
        "preemptions": run["preemptions"],
        "kv_peak_bytes": run["blocks_peak"] * run["block_bytes"],
        "kv_mean_bytes": run["blocks_mean"] * run["block_bytes"],
        "prefill_seconds": prefill,
        "compression_share": plugin["compress_seconds"] / prefill if prefill else 0.0,
        "requests_compressed": plugin["requests_compressed"],
        "blocks_freed": plugin["blocks_freed"],
        "steps": run["steps"],
        "prefill_steps": run["prefill_steps"],
    }


def summarise(results: dict[str, list[Run]]) -> dict[str, Row]:
    """Medians over the rounds, by variant; ratios are medians of the rounds' ratios.

    Args:
        results: by variant, a run per round; ``stock`` among them. A refused variant has no figures
            and keeps vLLM's reason.
    """
    stock = [figures(run) for run in results[STOCK]]
    rows: dict[str, Row] = {}
    for name, runs in results.items():
        if "refused" in runs[0]:
            rows[name] = {"refused": runs[0]["refused"]}
            continue
        found = [figures(run) for run in runs]
        row: Row = {key: statistics.median(one[key] for one in found) for key in found[0]}
        for key in ("tokens_per_second", "running_mean", "running_peak"):
            ratios = [one[key] / base[key] for one, base in zip(found, stock, strict=True)]
            row[f"{key}_to_stock"] = statistics.median(ratios)
        rows[name] = row
    return rows


def nothing_compressed(
    settings: dict[str, dict[str, Any] | None], results: dict[str, list[Run]]
) -> str:
    """One sentence when a variant did not do what its name says, else an empty string.

    Args:
        settings: the plugin's settings by variant; None where it is off. ``idle`` must compress
            nothing; a keep ratio of 1 compresses and frees nothing.
        results: every round counts.
    """
    for name, chosen in settings.items():
        if chosen is None:
            continue
        for run in results[name]:
            compressed = run["plugin"]["requests_compressed"]
            if name == "idle":
                if compressed:
                    return f"Variant idle compressed {compressed:.0f} prompts: it was not idle."
            elif not compressed:
                return f"Variant {name} compressed no prompt: its figures would be stock vLLM's."
            elif chosen["keep_ratio"] < 1 and run["plugin"]["blocks_freed"] <= 0:
                return f"Variant {name} compressed {compressed:.0f} prompts and freed no block."
    return ""


def table(rows: dict[str, Row]) -> str:
    """The rows as a Markdown table, columns aligned."""
    lines: list[Sequence[str]] = [HEADINGS]
    for name, row in rows.items():
        if "refused" in row:
            lines.append([name, f"refused: {row['refused']}", *[""] * (len(HEADINGS) - 2)])
            continue
        compresses = row["requests_compressed"] > 0
        lines.append(
            [
                name,
                f"{row['tokens_per_second']:.1f}",
                f"{row['tokens_per_second_to_stock']:.2f}",
                f"{row['total_seconds']:.1f}",
                f"{row['ttft_median_seconds']:.2f}",
                f"{row['ttft_p99_seconds']:.2f}",
                f"{row['tpot_median_seconds'] * 1e3:.1f}",
                f"{row['tpot_p99_seconds'] * 1e3:.1f}",
                f"{row['running_peak']:.0f}",
                f"{row['running_mean']:.1f}",
                f"{row['running_mean_to_stock']:.2f}",
                f"{row['preemptions']:.0f}",
                f"{row['kv_peak_bytes'] / MIB:.1f}",
                f"{row['kv_mean_bytes'] / MIB:.1f}",
                f"{row['compression_share']:.1%}" if compresses else "",
                f"{row['blocks_freed']:.0f}" if compresses else "",
            ]
        )
    return aligned(lines)


def profile_table(results: dict[str, list[Run]]) -> str:
    """Steps of each variant, and the share of their time that each part took, as Markdown.

    "Of them prefill": steps that read several tokens of a prompt, and their share of the time.
    """
    lines: list[Sequence[str]] = [
        ("variant", "steps", "mean step (ms)", "of them prefill", "their time", *PARTS),
    ]
    for name, runs in results.items():
        if "refused" in runs[0]:
            continue
        totals = [sum(run["profile"].values()) for run in runs]
        middle = [statistics.median(run[key] for run in runs) for key in ("steps", "prefill_steps")]
        shares = [
            statistics.median(
                run["profile"].get(part, 0.0) / total
                for run, total in zip(runs, totals, strict=True)
            )
            for part in PARTS
        ]
        step = statistics.median(t / run["steps"] for t, run in zip(totals, runs, strict=True))
        prefill = statistics.median(
            run["prefill_steps_seconds"] / run["total_seconds"] for run in runs
        )
        shown = [f"{middle[0]:.0f}", f"{step * 1e3:.1f}", f"{middle[1]:.0f}", f"{prefill:.1%}"]
        lines.append([name, *shown, *(f"{share:.1%}" for share in shares)])
    return aligned(lines)


def prefill_limit(rows: dict[str, Row]) -> tuple[float, float]:
    """What prefill leaves to gain for anybody who compresses after it.

    Returns:
        the share of stock vLLM's time that went into reading prompts, and the throughput, as a
        ratio to stock, if everything else were free; zeros when no step was without a prompt.
    """
    stock = rows[STOCK]
    share = stock["prefill_seconds"] / stock["total_seconds"]
    return share, 1 / share if share else 0.0


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Markdown table of a heading and rows; the first column to the left, others to the right."""
    # A refusal is longer than any figure and may stick out.
    widths = [
        max(len(line[i]) for line in lines if not line[i].startswith("refused"))
        for i in range(len(lines[0]))
    ]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def row(cells: Sequence[str]) -> str:
        shown = [cells[0].ljust(widths[0])]
        shown += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return "| " + " | ".join(shown) + " |"

    return "\n".join([row(lines[0]), row(rule), *(row(line) for line in lines[1:])])


def binned(run: Run, width_seconds: float) -> tuple[list[float], list[float]]:
    """KV bytes held as means over equal spans of time: compression makes the raw series a saw.

    Returns:
        middle of each span in seconds, and mean bytes held in it.
    """
    total = run["total_seconds"]
    bounds = np.append(np.arange(0, total, width_seconds), total)
    moments = np.append(run["series"]["seconds"], total)
    # Block-seconds up to each reading grow linearly between readings.
    grown = np.cumsum([0, *(np.diff(moments) * run["series"]["blocks"])])
    means = np.diff(np.interp(bounds, moments, grown)) / np.maximum(np.diff(bounds), 1e-9)
    middles = (bounds[1:] + bounds[:-1]) / 2
    return middles.tolist(), (means * run["block_bytes"]).tolist()


def draw(
    path: Path, results: dict[str, list[Run]], rows: dict[str, Row], ratios: dict[str, float]
) -> None:
    """KV bytes held over time, and throughput against keep ratio, into a PNG.

    Args:
        path: of the file.
        results: the last round's series is drawn.
        rows: medians.
        ratios: keep ratio of the variants that have one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    over_time, against_ratio = figure.subplots(1, 2, width_ratios=(3, 2))
    last = {name: runs[-1] for name, runs in results.items() if "refused" not in runs[-1]}
    longest = max(run["total_seconds"] for run in last.values())
    for name, run in last.items():
        middles, held = binned(run, longest / TIME_SPANS)
        over_time.plot(middles, [value / MIB for value in held], linewidth=1.2, label=name)
    over_time.set(xlabel="seconds", ylabel="KV cache held (MiB, mean)", ylim=(0, None))
    over_time.legend(fontsize="x-small")
    points = sorted((ratio, rows[name]["tokens_per_second"]) for name, ratio in ratios.items())
    keep = [ratio for ratio, _ in points]
    speeds = [speed for _, speed in points]
    against_ratio.plot(keep, speeds, marker="o", markersize=4, label="compressed")
    for name in rows:
        if name not in ratios and "refused" not in rows[name]:
            line = {STOCK: "-", "idle": ":"}.get(name, "--")
            speed = rows[name]["tokens_per_second"]
            against_ratio.axhline(speed, linestyle=line, linewidth=1, color="black", label=name)
    against_ratio.set(
        xlabel="keep ratio", ylabel="output tokens / s", ylim=(0, None), xlim=(0, 1.05)
    )
    against_ratio.legend(fontsize="x-small")
    figure.savefig(path, dpi=120)
