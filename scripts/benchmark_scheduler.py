"""What a step costs vLLM's scheduler and worker when the running requests are compressed.

    python scripts/benchmark_scheduler.py

Bookkeeping only, no model's arithmetic. Three tables:

- ``scheduler``: vLLM's own scheduler over vLLM's own block pool, in steps in which every request
  decodes one token. The cost per request must depend neither on how many requests run, nor on how
  many blocks their compressed prefixes hold, nor on how many prefixes are cached.
- ``turnover``: the same while one request in 32 ends in each step and a cached prompt comes again,
  which stock vLLM finds raw in its prefix cache and the plugin finds compressed.
- ``worker``: what a worker does in a decode step beside the forward pass, in real engines.

With the plugin and without it take turns **step by step** in one process, so what slows the machine
down slows both down.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
from functools import partial
from typing import TYPE_CHECKING, Any

from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

os.environ.update({**CPU_ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})

from benchmarks.scheduler_steps import KEEP_RATIO, SchedulerSteps
from benchmarks.worker_steps import WorkerSteps
from vllm_kvzip.evaluation.engines import BLOCK_SIZE, versions

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS = ("scheduler", "turnover", "worker")
TURNOVER = 32
"""One request in so many ends in a step of the table of that name."""


def compare(
    stock: Callable[[], float], compressed: Callable[[], float], num_steps: int
) -> tuple[float, float, float]:
    """Median seconds of a step of each, and the median ratio of two steps in turn.

    Args:
        stock, compressed: run one step; return its seconds.
        num_steps: of each.
    """
    gc.collect()
    pairs = [(stock(), compressed()) for _ in range(num_steps)]
    ratios = [ours / theirs for theirs, ours in pairs]
    theirs, ours = zip(*pairs, strict=True)
    return statistics.median(theirs), statistics.median(ours), statistics.median(ratios)


def print_row(first: list[Any], found: tuple[float, float, float], num_requests: int) -> None:
    """One row of a table: times per running request, and their ratio."""
    stock, ours, ratio = found
    times = [f"{1e6 * seconds / num_requests:.1f} us" for seconds in (stock, ours)]
    print("| " + " | ".join([*map(str, first), *times, f"{ratio:.2f}"]) + " |", flush=True)


def print_head(part: str, columns: list[str]) -> None:
    """Name and columns of a table."""
    columns = [*columns, "stock", "compressed", "ratio"]
    print(f"\n{part}:\n\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def step_of(steps: SchedulerSteps, leaving: int) -> float:
    """Seconds of one step, before which ``leaving`` requests end and as many arrive."""
    if leaving:
        steps.replace(leaving)
    return steps.step()


def time_schedulers(args: argparse.Namespace, *, turnover: bool) -> int:
    """The first two tables; the exit status."""
    print_head(
        "turnover" if turnover else "scheduler",
        ["running", "prompt tokens", "cached prompts", "blocks held, stock", "compressed"],
    )
    for num_cached in args.cached:
        for num_requests in args.requests:
            for prompt_tokens in args.prompt_tokens:
                if turnover and not num_cached:
                    continue
                load = (num_requests, prompt_tokens, num_cached, args.steps)
                stock = SchedulerSteps(*load, compress=False)
                ours = SchedulerSteps(*load, compress=True)
                held = stock.num_held_blocks, ours.num_held_blocks
                if held[1] >= held[0] or ours.num_compressed_prefixes < num_cached:
                    print(f"Nothing was compressed: {held[1]} blocks held, stock {held[0]}.")
                    return 1

                leaving = max(1, num_requests // TURNOVER) if turnover else 0
                found = compare(
                    partial(step_of, stock, leaving), partial(step_of, ours, leaving), args.steps
                )
                print_row([num_requests, prompt_tokens, num_cached, *held], found, num_requests)
    return 0


def time_workers(args: argparse.Namespace) -> int:
    """The third table; the exit status."""
    print_head("worker", ["running", "prompt tokens"])
    alive = []  # an engine that is collected takes vLLM's process groups of all engines with it
    for num_requests in args.requests:
        load = (num_requests, min(args.prompt_tokens), args.steps)
        stock = WorkerSteps(*load, compress=False)
        ours = WorkerSteps(*load, compress=True)
        alive += [stock, ours]
        if ours.num_compressed != num_requests:
            print(f"Only {ours.num_compressed} of {num_requests} requests were compressed.")
            return 1
        found = compare(stock.step, ours.step, args.steps)
        print_row([num_requests, min(args.prompt_tokens)], found, num_requests)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 256, 1024, 4096])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--cached", type=int, nargs="+", default=[0, 100_000])
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    for part in args.parts:
        if part == "worker":
            status = time_workers(args)
        else:
            status = time_schedulers(args, turnover=part == "turnover")
        if status:
            return status
    print(
        f"\nMedian time of a step per running request; keep ratio {KEEP_RATIO}, blocks of "
        f"{BLOCK_SIZE} tokens. {versions()}",
        flush=True,
    )
    os._exit(0)  # vLLM's own shutdown of the engines costs seconds


if __name__ == "__main__":
    raise SystemExit(main())
