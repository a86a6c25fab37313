"""What evaluations and benchmarks share: a small engine, its counters, the versions."""

from __future__ import annotations

import os
import platform
from datetime import date
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY

from vllm_kvzip.evaluation.model_files import fingerprint_of

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import LLM

BLOCK_SIZE = 32  # what the plugin chooses on the CPU
LEAST_GPU_CACHE = 2 * 2**30  # bytes
CONTEXTS_IN_GPU_CACHE = 3  # of the longest, at least


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

    from vllm_kvzip.vllm_bridge.symbols import LLM

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


def versions() -> str:
    """Machine, versions and date, the last line of every table."""
    import torch

    from vllm_kvzip.vllm_bridge.symbols import vllm_version

    card = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{card}vLLM {vllm_version}, {platform.machine()} {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {date.today().isoformat()}"
    )
