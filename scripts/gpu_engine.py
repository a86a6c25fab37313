"""What only vLLM's engine on a card can answer: the same tokens, blocks freed, waits, throughput.

    python scripts/gpu_engine.py                # on a machine with vLLM and an NVIDIA card
    python scripts/gpu_engine.py --part engines # only whether answers are right
    python scripts/gpu_engine.py --small        # the same checks on the CPU, tiny

Each engine is a process of its own, stepped by hand, with CUDA graphs on; several share the card
where no time is taken. One that fails is reported, and the others go on. Token identity is asked
of the shipped models in float32; in bfloat16 two kernels that are both right differ in ties, so
there the share of equal tokens is told and not judged. Throughput is that of shapes with random
weights (``benchmark_kv_cache.py``): long prompts of Llama-3.1-8B in a pool that holds ten of 40,
and long answers of Llama-3.2-1B with a decode budget, in a pool for eight of 40 and in one for all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpu.clone  # noqa: F401
from benchmarks.engine_turns import answer_job, take_turn
from gpu.engine_jobs import (
    ANSWERS,
    CACHE_BYTES,
    EIGHT_BITS,
    MIXED,
    PROMISE,
    chosen_jobs,
    jobs,
    model_of,
)
from vllm_kvzip.evaluation.engines import counter, versions
from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

ROOT = Path(__file__).parent.parent
OUTPUT_TOKENS = 24
LEAST_EQUAL = 0.8  # of the tokens in 8 bits, up to the first that differs
MOST_HELD = {"keep 0.25": 0.6, "quantize int8": 0.8, "mixed 0.125": 0.5, ANSWERS: 0.4, PROMISE: 0.9}
"""Of stock's blocks."""
SYNC_CHECK = {"VLLM_GPU_SYNC_CHECK": "error"}  # vLLM: no step may wait for the device
LONG_PROMPTS = "--shape llama-3.1-8b --prompt-tokens 8192 --output-tokens 512 --ratios 1.0 0.125"
LONG_ANSWERS = (
    "--shape llama-3.2-1b --prompt-tokens 256 --output-tokens 2048 --ratios 1.0 --decode-budget 512"
)
LOADS = {
    "long prompts": f"{LONG_PROMPTS} --pool-prompts 10",
    "long answers, memory short": f"{LONG_ANSWERS} --pool-prompts 8",
    "long answers, memory ample": f"{LONG_ANSWERS} --pool-prompts 41",
}
"""Arguments of ``benchmark_kv_cache.py``."""
LEAST_SECONDS = 20  # less would not do for an engine
ENGINE_SECONDS = 240  # an engine that takes longer hangs


def prompts(*, small: bool) -> list[list[int]]:
    """Contexts of many lengths, one of them below the threshold."""
    rng = np.random.default_rng(11)
    lengths = (40, 130, 256, 300) if small else (40, *range(100, 1500, 61))
    found: list[list[int]] = [make_context(rng, length).tokens.tolist() for length in lengths]
    return found


def use_other_scales() -> None:
    """Scales of an 8-bit cache as a checkpoint has them, where the model has none: not 1."""
    from vllm.model_executor.layers.attention import attention

    vllms = attention.set_default_quant_scales

    def set_scales(layer: Any, register_buffer: bool = False) -> None:
        vllms(layer, register_buffer)
        if layer.kv_cache_dtype.startswith("fp8"):
            for name, scale in (("_q_scale", 0.125), ("_k_scale", 0.5), ("_v_scale", 0.25)):
                getattr(layer, name).fill_(scale)

    attention.set_default_quant_scales = set_scales


def run_once(job: dict[str, Any]) -> dict[str, Any]:
    """All prompts through one engine; what it said and held."""
    from vllm import LLM

    if "kv_cache_dtype" in job["engine"]:
        use_other_scales()
    with tempfile.TemporaryDirectory() as folder:
        if "kind" in job:
            model = str(model_of(job["kind"], Path(folder)))
            job["engine"] |= {"model": model, "skip_tokenizer_init": True}
        llm = LLM(**job["engine"])
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    manager = core.scheduler.kv_cache_manager
    free = manager.block_pool.get_num_free_blocks()
    found: dict[str, Any] = drive(engine, core.scheduler, small=job["small"])
    if job.get("again"):
        engine.reset_prefix_cache()
        found["again"] = drive(engine, core.scheduler, small=job["small"])
    for _ in range(3):
        engine.step()
    return {
        **found,
        "missing_blocks": free - manager.block_pool.get_num_free_blocks(),
        "compressed": counter("requests_compressed_total"),
        "freed": counter("blocks_freed_total"),
        "rounds": counter("decode_rounds_total"),
    }


def drive(engine: Any, scheduler: Any, *, small: bool) -> dict[str, Any]:
    """All prompts at once; tokens, blocks held while all decode, and tokens found in a cache."""
    from vllm import SamplingParams

    pool = scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    for number, prompt in enumerate(prompts(small=small)):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params.clone())
    tokens: dict[str, list[int]] = {}
    cached: dict[str, int] = {}
    least_held = None
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
            cached[output.request_id] = output.num_cached_tokens or 0
        running = scheduler.running
        if len(running) > 1 and all(r.num_output_tokens > 4 for r in running):  # all decode
            held = free - pool.get_num_free_blocks()
            least_held = held if least_held is None else min(least_held, held)
    return {
        "tokens": [tokens[str(number)] for number in range(len(tokens))],
        "seconds": time.perf_counter() - begin,
        "least_held": least_held,
        "cached": sum(cached.values()),
    }


def run_all(
    folder: Path, *, small: bool, only: str, seconds: float
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """All engines, several at once on a card; none begins or runs on after so many seconds.

    Returns:
        what each answered, or ``{"failed": what it said}``; and, on a card, what vLLM says when no
        step may wait for the device.
    """
    end = time.monotonic() + seconds
    asked: dict[str, tuple[dict[str, Any], dict[str, str]]]
    known = jobs(small=small)
    asked = {name: (job, {}) for name, job in chosen_jobs(known, only).items()}
    watched = () if small or only else ("stock", "keep 0.25")
    for name in watched:
        asked[name] = (known[f"bfloat16, {name}"], SYNC_CHECK)

    def ask(numbered: tuple[int, str]) -> dict[str, Any]:
        number, name = numbered
        left = min(ENGINE_SECONDS, end - time.monotonic())
        if left < LEAST_SECONDS:
            return {"failed": "not asked: the time is over"}
        job, more = asked[name]
        more = {"TRITON_F32_DEFAULT": "ieee", **more}  # vLLM's Triton attention rounds to tf32
        answer: dict[str, Any]
        try:
            answer = take_turn(__file__, job, folder / f"{number}.json", left, **more)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            said = (error.stderr or b"").decode(errors="replace").strip()
            answer = {"failed": f"{said[-6000:]}\n{type(error).__name__}"}
        print(f"{name}: {answer.get('failed', 'done')[-700:]}", flush=True)
        return answer

    at_once = 1
    if not small:
        memory = torch.cuda.get_device_properties(0).total_memory
        at_once = max(1, min(12, 3 * (os.cpu_count() or 1) // 4, memory // (2 * CACHE_BYTES)))
    with ThreadPoolExecutor(at_once) as pool:
        found = dict(zip(asked, pool.map(ask, enumerate(asked)), strict=True))
    waits = {name: found.pop(name).get("failed", "none") for name in watched}
    return found, {name: " ".join(said.splitlines()[-2:])[:300] for name, said in waits.items()}


def judge(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the answers of the engines."""
    faults = []
    for name, answer in found.items():
        numbers, what = name.split(", ", 1)
        stock = found[f"{numbers}, stock"]
        if "failed" in answer:
            faults.append(f"{name}: the engine failed")
        if "failed" in answer or "failed" in stock:
            continue
        if answer["missing_blocks"]:
            faults.append(f"{name}: {answer['missing_blocks']} blocks are not back in the pool")
        if what != "stock" and not answer["compressed"]:
            faults.append(f"{name}: nothing was compressed")
        if what.startswith(ANSWERS) and not answer["rounds"]:
            faults.append(f"{name}: no answer was compressed")
        if what.startswith("keep 1.0") and numbers.startswith("float32"):
            if answer["tokens"] != stock["tokens"]:
                faults.append(f"{name}: {equal_share(answer, stock):.1%} of stock's tokens")
        if "again" in answer and what != "stock":
            faults += judge_again(name, answer["again"], stock)
        eight_bits = numbers == EIGHT_BITS and what.startswith("keep 1.0")
        if (eight_bits or what == "quantize int8") and equal_share(answer, stock) < LEAST_EQUAL:
            faults.append(f"{name}: {equal_share(answer, stock):.1%} of stock's tokens")
        if (most := MOST_HELD.get(what)) is not None and numbers.endswith(MIXED):
            most = 1.0  # other layers hold blocks of the same pool
        if most is not None and not answer["least_held"] < most * stock["least_held"]:
            faults.append(f"{name}: holds {answer['least_held']} of {stock['least_held']} blocks")
    return faults


def judge_again(name: str, answer: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    """What is wrong with answers to prompts that come from host memory."""
    faults = [] if answer["cached"] else [f"{name}: nothing came back from host memory"]
    if "keep 1.0" in name and answer["tokens"] != stock["tokens"]:
        share = equal_share(answer, stock)
        faults.append(f"{name}: {share:.1%} of stock's tokens the second time")
    return faults


def equal_share(answer: dict[str, Any], stock: dict[str, Any]) -> float:
    """Tokens that equal stock's up to the first that does not, over all."""
    same = total = 0
    for mine, theirs in zip(answer["tokens"], stock["tokens"], strict=True):
        total += len(theirs)
        for ours, other in zip(mine, theirs, strict=True):
            if ours != other:
                break
            same += 1
    return same / total


def table(found: dict[str, dict[str, Any]]) -> str:
    """One row per engine."""
    lines = [
        "| engine | stock's tokens | compressed | blocks freed | held while all decode |",
        "|---|---|---|---|---|",
    ]
    for name, answer in found.items():
        stock = found[f"{name.split(', ')[0]}, stock"]
        if "failed" in answer or "failed" in stock:
            lines.append(f"| {name} | {'failed' if 'failed' in answer else 'no stock'} | | | |")
            continue
        lines.append(
            f"| {name} | {equal_share(answer, stock):.1%} | {answer['compressed']:.0f} | "
            f"{answer['freed']:.0f} | {answer['least_held']} |"
        )
    return "\n".join(lines)


def installed_layout(folder: Path) -> str:
    """A folder for ``PYTHONPATH`` in which the plugin looks installed; links, no copies."""
    package = folder / "vllm_kvzip"
    package.mkdir()
    for path in (ROOT / "vllm_kvzip").iterdir():
        (package / path.name).symlink_to(path)
    for name in ("kernels", "profiles", "scripts/evaluation", "scripts/profiling"):
        (package / Path(name).name).symlink_to(ROOT / name)
    info = folder / "vllm_kvzip-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-kvzip\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nkvzip = vllm_kvzip.vllm_bridge.start.plugin:register\n"
    )
    return str(folder)


def throughput(folder: Path, load: str) -> dict[str, Any]:
    """The benchmark's rows for one of :data:`LOADS`: stock vLLM and ours."""
    command = [
        sys.executable, str(ROOT / "scripts" / "benchmark_kv_cache.py"),
        "--dtype", "bfloat16", "--block-size", "16", "--requests", "40", "--cuda-graphs",
        "--max-num-batched-tokens", "8192", "--without-fp8", "--rounds", "1",
        "--without-inductor",
        "--scorer", "keydiff", "--output-dir", str(folder), *LOADS[load].split(),
    ]  # fmt: skip
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=False)
    print(f"{load}\n{done.stdout[-4000:]}", flush=True)
    if done.returncode:
        return {"failed": done.returncode}
    rows = json.loads((folder / "kv_cache.json").read_text())["rows"]
    return {"rows": rows}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="on the CPU, tiny, no throughput")
    parser.add_argument("--part", choices=["engines", "throughput"], help="default: both")
    parser.add_argument("--only", default="", help="engines and loads that match this expression")
    parser.add_argument(
        "--seconds", type=float, default=3600, help="no engine begins or runs later"
    )
    parser.add_argument("--output-dir", type=Path, help="takes gpu_engines.json and another")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    engines = {} if args.part == "throughput" else jobs(small=args.small)
    loads = [] if args.part == "engines" or args.small else LOADS
    args.has_engines = bool(chosen_jobs(engines, args.only))
    args.loads = [load for load in loads if re.search(args.only, load)]
    if not (args.job or args.has_engines or args.loads):
        parser.error(f"--only {args.only} matches none of: {'; '.join([*engines, *loads])}")
    return args


def ask_engines(folder: Path, args: argparse.Namespace) -> list[str]:
    """The part that tells right from wrong; prints its table and returns what is wrong."""
    engines, waits = run_all(folder, small=args.small, only=args.only, seconds=args.seconds)
    faults = judge(engines)
    save(args, "gpu_engines", {"engines": engines, "faults": faults, "waits": waits})
    print(f"\n{table(engines)}")
    for fault in faults:
        print(f"FAILED {fault}")
    if waits:
        print("Waits for the device in a step: "
              + ", ".join(f"{name} {said}" for name, said in waits.items()))  # fmt: skip
    return faults


def save(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Write what was found where it is wanted."""
    if args.output_dir:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        found = {**found, "versions": versions()}
        (args.output_dir / f"{name}.json").write_text(json.dumps(found) + "\n")


def main() -> int:
    args = parse_args()
    if args.job:
        answer_job(args.job, run_once)
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not entry_points(group="vllm.general_plugins", name="kvzip"):
            layout = folder / "site"
            layout.mkdir()
            path = [installed_layout(layout), os.environ.get("PYTHONPATH", "")]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        if args.has_engines:
            faults += ask_engines(folder, args)
        if args.loads:
            measured = {load: throughput(folder, load) for load in args.loads}
            save(args, "gpu_throughput", measured)
            faults += [f"{load}: not measured" for load in measured if "failed" in measured[load]]
    print(versions(), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
