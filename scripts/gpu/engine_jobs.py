"""Which engines `gpu_engine.py` asks, with which arguments.

Token identity is asked in float32; in bfloat16 two kernels that are both right differ in ties.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "models" / "tiny-retriever"
WINDOWS, CONVOLUTIONS, LARGE_BLOCKS = MIXED = ("windows", "convolutions", "large blocks")
"""Models whose layers differ: full attention beside windows, beside states, in large blocks."""
DRAFTS = "drafts"
SPECULATION = {
    "method": "eagle", "model": str(MODEL.with_name("tiny-eagle")), "num_speculative_tokens": 3,
}  # fmt: skip
EIGHT_BITS = "bfloat16 over fp8"
EIGHT_BIT_JOBS = ("keep 1.0, kernel triton", "keep 0.25", "mixed 0.125", "keep 0.25, window")
ANSWERS, PROMISE, OFFLOADED = "decode budget", "quality loss", "offloading"
OFFLOADING = {
    "kv_connector": "OffloadingConnector", "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 2**30, "offload_prompt_only": False},
}  # fmt: skip
CACHE_BYTES = 2 * 2**30  # named, so that engines that share a card do not measure each other
GRAPHS = {"backend": "eager"}  # CUDA graphs without Inductor, so that many engines start together
SETTINGS = {"scorer": "keydiff", "budget": "adaptive", "min_prompt_tokens": 64}


def jobs(*, small: bool) -> dict[str, dict[str, Any]]:
    """Arguments of ``LLM`` by the name of the engine."""
    kernels = ("auto",) if small else ("triton", "vllm")
    plugin: dict[str, dict[str, Any] | None] = {"stock": None}
    for kernel in kernels:
        plugin[f"keep 1.0, kernel {kernel}"] = {"keep_ratio": 1.0, "attention_kernel": kernel}
    plugin["keep 0.25"] = {"keep_ratio": 0.25, "attention_kernel": kernels[0]}
    plugin["quantize int8"] = {"mode": "quantize", "key_format": "int8", "value_format": "int8"}
    if not small:
        plugin["mixed 0.125"] = {"mode": "mixed", "keep_bytes_ratio": 0.125}
        plugin["keep 0.25, window"] = {"keep_ratio": 0.25, "scorer": "window"}
        covered = {"keep_ratio": 1.0, "decode_budget": 2048, "attention_kernel": kernels[0]}
        plugin[f"keep 1.0, {ANSWERS}"] = covered
        plugin[ANSWERS] = {"keep_ratio": 0.25, "decode_budget": 64}  # less than most prompts keep
        plugin[f"{ANSWERS}, mixed"] = {"mode": "mixed", "decode_budget": 64}
        plugin[f"{ANSWERS}, seen again"] = {"scorer": "redundancy", "decode_budget": 64}
        plugin[f"{ANSWERS}, scored anew"] = {"scorer": "surrogate", "decode_budget": 64}
        plugin[PROMISE] = {"scorer": "surrogate", "quality_loss": 0.5}
        plugin["keep 0.25, eager"] = {"keep_ratio": 0.25, "attention_kernel": kernels[0]}
    found = {}
    for numbers in ("float32",) if small else ("float32", "bfloat16", EIGHT_BITS):
        for name, settings in plugin.items():
            if numbers == EIGHT_BITS and name not in ("stock", *EIGHT_BIT_JOBS):
                continue
            engine: dict[str, Any] = {
                "model": str(MODEL), "dtype": numbers.split()[0], "max_model_len": 2048,
                "max_num_seqs": 32, "max_num_batched_tokens": 512,
                "block_size": 32 if small else 16, "num_gpu_blocks_override": 4097,
                "enforce_eager": small or name.endswith("eager"), "disable_log_stats": True,
            }  # fmt: skip
            if not small:
                engine |= {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": CACHE_BYTES}
                engine["compilation_config"] = dict(GRAPHS)
            if name.endswith("kernel vllm"):  # full graphs hold our kernel
                engine["compilation_config"]["cudagraph_mode"] = "PIECEWISE"
            if settings is not None:
                engine["additional_config"] = {"kvzip": {**SETTINGS, **settings}}
            if numbers == EIGHT_BITS:
                engine["kv_cache_dtype"] = "fp8"
            found[f"{numbers}, {name}"] = {"engine": engine, "small": small}
    if small:
        return found
    return {**found, **mixed_jobs(found), **draft_jobs(found), **offloading_jobs(found)}


def chosen_jobs(asked: dict[str, dict[str, Any]], only: str) -> dict[str, dict[str, Any]]:
    """Those whose name matches, and the stock engines that they are compared with."""
    chosen = {name for name in asked if re.search(only, name)}
    chosen |= {f"{name.split(', ')[0]}, stock" for name in chosen}
    return {name: job for name, job in asked.items() if name in chosen}


def mixed_jobs(others: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same of models whose layers differ; one has random weights, which its engines make."""
    found = {}
    for kind, numbers in zip(MIXED, ("float32", "float32", "bfloat16"), strict=True):
        for name in ("stock", "keep 1.0, kernel triton", "keep 1.0, kernel vllm", "keep 0.25"):
            job = others[f"{numbers}, {name}"]
            found[f"{numbers} {kind}, {name}"] = {**job, "kind": kind}
    return found


def draft_jobs(others: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same with an EAGLE head's guesses, beside stock vLLM without them."""
    found = {f"float32 {DRAFTS}, stock": others["float32, stock"]}
    for name in ("keep 1.0, kernel triton", "keep 1.0, kernel vllm", "keep 0.25", "mixed 0.125"):
        job = others[f"float32, {name}"]
        engine = {**job["engine"], "speculative_config": SPECULATION}
        found[f"float32 {DRAFTS}, {name}"] = {**job, "engine": engine}
    return found


def offloading_jobs(others: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same beside blocks in host memory, from which all prompts come a second time."""
    found = {f"float32 {OFFLOADED}, stock": {**others["float32, stock"], "again": True}}
    for name in ("keep 1.0, kernel triton", "keep 0.25"):
        job = others[f"float32, {name}"]
        engine = {**job["engine"], "kv_transfer_config": OFFLOADING}
        found[f"float32 {OFFLOADED}, {name}"] = {**job, "engine": engine, "again": True}
    return found


def model_of(kind: str, folder: Path) -> Path:
    """The folder of one of :data:`MIXED`."""
    if kind != LARGE_BLOCKS:
        return MODEL.parent / {WINDOWS: "tiny-windowed", CONVOLUTIONS: "tiny-convolved"}[kind]
    sys.path.append(str(ROOT / "tests" / "support"))
    made: Path = import_module("random_model").make_random_model("qwen3-next", folder)
    return made
