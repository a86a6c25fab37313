"""Everything only a card can answer about the kernels, in one run; see ``gpu_suite.sh``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="dry run on the CPU, tiny shapes")
    parser.add_argument("--part", choices=["checks", "times"], help="default: both")
    parser.add_argument("--processes", type=int, help="that share the checks; default: by the CPU")
    parser.add_argument("--tune", action="store_true", help="also try ways of cutting the work")
    parser.add_argument("--output-dir", type=Path, help="takes gpu_checks.json and gpu_times.json")
    args = parser.parse_args()
    if args.processes is None:
        args.processes = 1 if args.interpret else max(1, min(12, (os.cpu_count() or 1) - 4))
    return args


ARGS = parse_args()
os.environ["TRITON_INTERPRET"] = "1" if ARGS.interpret else "0"  # before kernels are decorated

import torch
import triton

from gpu.benchmark import (
    LOADS,
    SMALL_LOADS,
    TUNED,
    Load,
    compaction_row,
    copy_bandwidth,
    decode_rows,
    quantized_rows,
    score_row,
    tuning_rows,
)
from gpu.checks import all_checks


def say(*parts: object) -> None:
    print(*parts, flush=True)


def machine(device: str) -> str:
    """Card and versions, for the head of the table."""
    card = "Triton's interpreter on a CPU: times mean nothing"
    if device != "cpu":
        card = torch.cuda.get_device_name()
    python = platform.python_version()
    return f"{card}; torch {torch.__version__}, Triton {triton.__version__}, Python {python}"


def check(device: str) -> list[dict[str, Any]]:
    """Run every check; prints those that fail."""
    begin = time.perf_counter()
    found = []
    for result in all_checks(device, small=ARGS.interpret, num_processes=ARGS.processes):
        found.append({"name": result.name, "error": result.error, "limit": result.limit})
        if not result.passed:
            what = result.fault or f"error {result.error:.2e}, allowed {result.limit:.0e}"
            say(f"FAILED {result.name}: {what}")
            found[-1]["failed"] = what
    num_passed = sum("failed" not in item for item in found)
    seconds = time.perf_counter() - begin
    say(f"{num_passed} of {len(found)} checks passed in {seconds:.0f} s. {machine(device)}")
    return found


def decode_table(rows: list[dict[str, Any]]) -> str:
    """Keep ratios side by side: time over the fastest stock kernel, and share of copy bandwidth."""
    loads = sorted({(row["group"], row["batch"], row["context"]) for row in rows})
    ratios = sorted({row["keep"] for row in rows}, reverse=True)
    lines = [
        "| GQA | batch | context | stock (us) | "
        + " | ".join(f"keep {ratio:g}" for ratio in ratios)
        + " |",
        "|---" * (4 + len(ratios)) + "|",
    ]
    for group, batch, context in loads:
        mine = [
            row
            for row in rows
            if (row["group"], row["batch"], row["context"]) == (group, batch, context)
        ]
        mine.sort(key=lambda row: -row["keep"])
        cells = [
            f"{row['ratio']:.2f} ({row['bandwidth_share']:.0%})"
            + (f", FA {row['flash_us'] / row['stock_us']:.2f}" if row["flash_us"] else "")
            for row in mine
        ]
        stock = f"{mine[0]['stock']} {mine[0]['stock_us']:.0f}"
        lines.append(f"| {group} | {batch} | {context} | {stock} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def save(name: str, found: dict[str, Any]) -> None:
    """Write what was found where it is wanted."""
    if ARGS.output_dir:
        ARGS.output_dir.mkdir(parents=True, exist_ok=True)
        (ARGS.output_dir / f"{name}.json").write_text(json.dumps(found) + "\n")


def time_kernels(device: str) -> None:
    """Every figure, and its tables."""
    bandwidth = copy_bandwidth(device, 1 << (16 if ARGS.interpret else 32))
    compaction = compaction_row(device, bandwidth, small=ARGS.interpret)
    scores = score_row(device, small=ARGS.interpret)
    say(
        f"\ncopy {bandwidth / 1e12:.2f} TB/s; compaction {compaction['ms']:.2f} ms "
        f"({compaction['bandwidth_share']:.0%} of copy bandwidth); scores {scores['ms']:.2f} ms "
        f"({scores['tflops']:.0f} TFLOP/s, {scores['of_product']:.2f} of the product alone)"
    )
    rows = decode_rows(SMALL_LOADS if ARGS.interpret else LOADS, device, bandwidth)
    say(f"\nDecode, time / fastest stock kernel (share of copy bandwidth)\n{decode_table(rows)}")
    loads = SMALL_LOADS[:1] if ARGS.interpret else [Load(8, 32768, 4), Load(32, 4096, 4)]
    quantized = quantized_rows(loads, device)
    say("\nDecode over quantized pages, time / that over ordinary ones of as many tokens")
    for row in quantized:
        say(
            f"| {row['group']} | {row['batch']} | {row['context']} | {row['format']} | "
            f"{row['us']:.0f} us | {row['of_ordinary']:.2f} |"
        )
    found: dict[str, Any] = {
        "machine": machine(device),
        "copy_bytes_per_second": bandwidth,
        "decode": rows,
        "quantized": quantized,
        "compaction": compaction,
        "scores": scores,
    }
    if ARGS.tune:
        found["tuning"] = [tuning_rows(load, keep, device) for load, keep in TUNED]
        for rows in found["tuning"]:
            own = next(row for row in rows if "tokens" not in row)
            for row in [own, *rows[:5]]:
                say(row)
    save("gpu_times", found)
    say(machine(device))


def main() -> int:
    if not ARGS.interpret and not torch.cuda.is_available():
        say("No CUDA card here; --interpret runs the same on the CPU with tiny shapes.")
        return 2
    device = "cpu" if ARGS.interpret else "cuda"
    say(machine(device))
    failed = False
    if ARGS.part != "times":
        checks = check(device)
        save("gpu_checks", {"machine": machine(device), "checks": checks})
        failed = any("failed" in item for item in checks)
    if ARGS.part != "checks":
        time_kernels(device)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
