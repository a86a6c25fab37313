"""What only vLLM's engine on a card can answer: the same tokens, blocks freed, waits, throughput.

    python scripts/gpu_engine.py                # on a machine with vLLM and an NVIDIA card
    python scripts/gpu_engine.py --part engines # only whether answers are right
    python scripts/gpu_engine.py --small        # the same checks on the CPU, tiny

Each engine is a process of its own, stepped by hand, with CUDA graphs on; several share the card
where no time is taken. One that fails is reported, and the others go on. Token identity is asked
of the shipped models in float32; in bfloat16 two kernels that are both right differ in ties, so
there the share of equal tokens is told and not judged. Throughput is that of the shape of
Llama-3.1-8B with random weights, in a pool that holds ten prompts (``benchmark_kv_cache.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gpu.clone  # noqa: F401
from benchmarks.engine_turns import answer_job, take_turn
from vllm_kvzip.evaluation.engines import counter, versions
from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "tests" / "models" / "tiny-retriever"
WINDOWS, CONVOLUTIONS, LARGE_BLOCKS = MIXED = ("windows", "convolutions", "large blocks")
"""Models whose layers differ: full attention beside windows, beside states, in large blocks."""
DRAFTS = "drafts"
SPECULATION = {
    "method": "eagle", "model": str(MODEL.with_name("tiny-eagle")), "num_speculative_tokens": 3,
}  # fmt: skip
OUTPUT_TOKENS = 24
EIGHT_BITS = "bfloat16 over fp8"
EIGHT_BIT_JOBS = ("keep 1.0, kernel triton", "keep 0.25", "mixed 0.125", "keep 0.25, window")
LEAST_EQUAL = 0.8  # of the tokens in 8 bits, up to the first that differs
ANSWERS, PROMISE = "decode budget", "quality loss"
MOST_HELD = {"keep 0.25": 0.6, "quantize int8": 0.8, "mixed 0.125": 0.5, ANSWERS: 0.4, PROMISE: 0.9}
"""Of stock's blocks."""
SYNC_CHECK = {"VLLM_GPU_SYNC_CHECK": "error"}  # vLLM: no step may wait for the device
ENGINE_SECONDS = 240  # an engine that takes longer hangs
CACHE_BYTES = 2 * 2**30  # named, so that engines that share a card do not measure each other
SETTINGS = {"scorer": "keydiff", "budget": "adaptive", "min_prompt_tokens": 64}


def prompts(*, small: bool) -> list[list[int]]:
    """Contexts of many lengths, one of them below the threshold."""
    rng = np.random.default_rng(11)
    lengths = (40, 130, 256, 300) if small else (40, *range(100, 1500, 61))
    found: list[list[int]] = [make_context(rng, length).tokens.tolist() for length in lengths]
    return found


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
        plugin[ANSWERS] = {"keep_ratio": 0.25, "decode_budget": 64}  # less than most prompts keep
        plugin[f"{ANSWERS}, mixed"] = {"mode": "mixed", "decode_budget": 128}
        plugin[f"{ANSWERS}, seen again"] = {"scorer": "redundancy", "decode_budget": 64}
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
            if name.endswith("kernel vllm"):  # full graphs hold our kernel
                engine["compilation_config"] = {"cudagraph_mode": "PIECEWISE"}
            if settings is not None:
                engine["additional_config"] = {"kvzip": {**SETTINGS, **settings}}
            if numbers == EIGHT_BITS:
                engine["kv_cache_dtype"] = "fp8"
            found[f"{numbers}, {name}"] = {"engine": engine, "small": small}
    return found if small else {**found, **mixed_jobs(found), **draft_jobs(found)}


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


def model_of(kind: str, folder: Path) -> Path:
    """The folder of one of :data:`MIXED`."""
    if kind != LARGE_BLOCKS:
        return MODEL.parent / {WINDOWS: "tiny-windowed", CONVOLUTIONS: "tiny-convolved"}[kind]
    sys.path.append(str(ROOT / "tests" / "support"))
    made: Path = import_module("random_model").make_random_model("qwen3-next", folder)
    return made


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
    from vllm import LLM, SamplingParams

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
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    for number, prompt in enumerate(prompts(small=job["small"])):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params.clone())
    tokens: dict[str, list[int]] = {}
    least_held = None
    begin = time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        running = core.scheduler.running
        if len(running) > 1 and all(r.num_output_tokens > 4 for r in running):  # all decode
            held = free - manager.block_pool.get_num_free_blocks()
            least_held = held if least_held is None else min(least_held, held)
    seconds = time.perf_counter() - begin
    for _ in range(3):
        engine.step()
    return {
        "tokens": [tokens[str(number)] for number in range(len(tokens))],
        "seconds": seconds,
        "least_held": least_held,
        "missing_blocks": free - manager.block_pool.get_num_free_blocks(),
        "compressed": counter("requests_compressed_total"),
        "freed": counter("blocks_freed_total"),
        "rounds": counter("decode_rounds_total"),
    }


def run_all(folder: Path, *, small: bool) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """All engines, several at once on a card.

    Returns:
        what each answered, or ``{"failed": what it said}``; and, on a card, what vLLM says when no
        step may wait for the device.
    """
    asked: dict[str, tuple[dict[str, Any], dict[str, str]]]
    asked = {name: (job, {}) for name, job in jobs(small=small).items()}
    watched = () if small else ("stock", "keep 0.25")
    for name in watched:
        asked[name] = (asked[f"bfloat16, {name}"][0], SYNC_CHECK)

    def ask(numbered: tuple[int, str]) -> dict[str, Any]:
        number, name = numbered
        job, more = asked[name]
        more = {"TRITON_F32_DEFAULT": "ieee", **more}  # vLLM's Triton attention rounds to tf32
        answer: dict[str, Any]
        try:
            answer = take_turn(__file__, job, folder / f"{number}.json", ENGINE_SECONDS, **more)
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
        eight_bits = numbers == EIGHT_BITS and what.startswith("keep 1.0")
        if (eight_bits or what == "quantize int8") and equal_share(answer, stock) < LEAST_EQUAL:
            faults.append(f"{name}: {equal_share(answer, stock):.1%} of stock's tokens")
        if (most := MOST_HELD.get(what)) is not None and numbers.endswith(MIXED):
            most = 1.0  # other layers hold blocks of the same pool
        if most is not None and not answer["least_held"] < most * stock["least_held"]:
            faults.append(f"{name}: holds {answer['least_held']} of {stock['least_held']} blocks")
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


def throughput(folder: Path) -> dict[str, Any]:
    """The benchmark's rows: stock, keep 1.0 and keep 0.125 of an 8B model's shape."""
    command = [
        sys.executable, str(ROOT / "scripts" / "benchmark_kv_cache.py"), "--shape", "llama-3.1-8b",
        "--dtype", "bfloat16", "--block-size", "16", "--prompt-tokens", "8192",
        "--output-tokens", "512", "--pool-prompts", "10", "--requests", "40", "--cuda-graphs",
        "--max-num-batched-tokens", "8192", "--ratios", "1.0", "0.125", "--without-fp8",
        "--rounds", "1", "--scorer", "keydiff", "--output-dir", str(folder),
    ]  # fmt: skip
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, check=False)
    print(done.stdout[-4000:], flush=True)
    if done.returncode:
        return {"failed": done.returncode}
    rows = json.loads((folder / "kv_cache.json").read_text())["rows"]
    return {"rows": rows}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="on the CPU, tiny, no throughput")
    parser.add_argument("--part", choices=["engines", "throughput"], help="default: both")
    parser.add_argument("--output-dir", type=Path, help="takes gpu_engines.json and another")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def ask_engines(folder: Path, args: argparse.Namespace) -> list[str]:
    """The part that tells right from wrong; prints its table and returns what is wrong."""
    engines, waits = run_all(folder, small=args.small)
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
        if args.part != "throughput":
            faults += ask_engines(folder, args)
        if args.part != "engines" and not args.small:
            found = throughput(folder)
            save(args, "gpu_throughput", found)
            faults += ["throughput was not measured"] if "failed" in found else []
    print(versions(), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
