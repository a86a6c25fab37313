"""What the evaluation scripts share: an engine, counters, intervals, the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from math import sqrt
from typing import TYPE_CHECKING, Any

from model_files import fingerprint_of
from prometheus_client import REGISTRY

if TYPE_CHECKING:
    from vllm import LLM

BLOCK_SIZE = 32  # what the plugin chooses on the CPU
LEAST_GPU_CACHE = 2 * 2**30  # bytes
CONTEXTS_IN_GPU_CACHE = 3  # of the longest, at least

Counts = Sequence[tuple[int, int]]  # right and all answer tokens of each context


def start_engine(
    model: str,
    settings: dict[str, Any] | None,
    num_ranks: int = 1,
    dtype: str = "float32",
    **more: Any,
) -> LLM:
    """A small engine, with the plugin's settings or, when they are None, without compression.

    Args:
        model: its folder.
        settings: see above.
        num_ranks: tensor-parallel processes.
        dtype: of the model and its KV cache.
        more: of vLLM's engine.
    """
    import torch
    from vllm import LLM

    memory: dict[str, Any] = {"gpu_memory_utilization": 0.3}
    if torch.cuda.is_available():  # room for many engines, one after the other or side by side
        shape = fingerprint_of(model)
        pairs = shape.num_layers * shape.num_kv_heads * more.get("max_model_len", 0)
        needed = 2 * pairs * shape.head_dim * getattr(torch, dtype).itemsize
        cache_bytes = max(LEAST_GPU_CACHE, CONTEXTS_IN_GPU_CACHE * needed)
        memory = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": cache_bytes}
    return LLM(
        model=model,
        dtype=dtype,
        enforce_eager=True,
        disable_log_stats=True,
        block_size=BLOCK_SIZE,
        tensor_parallel_size=num_ranks,
        additional_config={} if settings is None else {"kvzip": settings},
        **(memory | more),
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


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_of_clusters(sums: Sequence[tuple[float, int]]) -> Estimate | None:
    """Mean of values that come in clusters, one per context; None when there is no value.

    The ratio estimator's interval: contexts are what is drawn, not values, with Student's t.

    Args:
        sums: sum and number of the values of each cluster.
    """
    sums = [(total, count) for total, count in sums if count]
    if not sums:
        return None
    num_values = sum(count for _, count in sums)
    mean = sum(total for total, _ in sums) / num_values
    freedom = len(sums) - 1
    if freedom == 0:
        return Estimate(mean, float("-inf"), float("inf"))
    spread = sum((total - mean * count) ** 2 for total, count in sums)
    half = student_t(freedom) * sqrt(spread * len(sums) / freedom) / num_values
    return Estimate(mean, mean - half, mean + half)


def student_t(freedom: int) -> float:
    """Student's t that 2.5 % exceed, by its expansion around the normal one (Abramowitz 26.7.5)."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, 1))


def versions() -> str:
    """Machine, versions and date, the last line of every table."""
    import torch
    import vllm

    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{card}vLLM {vllm.__version__}, {platform.machine()} {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {date.today().isoformat()}"
    )
