"""What does a smaller KV cache buy? Throughput, latency and memory against stock vLLM, in one run.

    python scripts/benchmark_kv_cache.py --shape attention

More requests than the block pool can hold ask the same engine: stock vLLM, vLLM's own fp8 cache
(twice to four times the blocks for the same bytes), and the plugin at several keep ratios. All have
the same bytes of pool and the same random prompts, each variant in an engine of its own; variants
take turns. Fails when a compressed variant compressed nothing.

``--model FOLDER`` times a model, with ``--dummy-weights`` its ``config.json`` alone; ``--shape``
takes a built-in one, and ``--layers`` cuts it to what a CPU can run. Answers are not looked at:
what is left of them is the matter of ``eval_quality.py``. ``kv_cache_run.py`` says why the engine
is stepped by hand and not asked by ``vllm bench``.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.engine_turns import add_arguments, answer_job, take_turns
from benchmarks.kv_cache_report import (
    STOCK,
    draw,
    nothing_compressed,
    prefill_limit,
    profile_table,
    summarise,
    table,
)
from benchmarks.kv_cache_run import Load, run_variant
from benchmarks.kv_cache_shapes import BYTES_OF_DTYPE, SHAPE_NOTES, SHAPES, in_words, write_shape
from vllm_kvzip.evaluation.engines import BLOCK_SIZE, versions

KEEP_RATIOS = (0.9, 0.7, 0.5, 0.25, 0.125)
FP8 = "fp8 cache"


def pool_blocks(args: argparse.Namespace) -> int:
    """Blocks that hold ``--pool-prompts`` requests at their full length, output included."""
    tokens = args.prompt_tokens + args.output_tokens
    blocks: float = args.pool_prompts * math.ceil(tokens / args.block_size)
    return math.ceil(blocks)


def plugin_settings(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """The plugin's settings by variant, in the table's order; None where it is off."""
    chosen = {
        "scorer": args.scorer,
        "budget": args.budget,
        "prefill_budget": args.prefill_budget,
        "decode_budget": args.decode_budget,
    }
    given = {key: value for key, value in chosen.items() if value}
    variants: dict[str, dict[str, Any] | None] = {STOCK: None}
    if not args.without_fp8:
        variants[FP8] = None
    if args.with_idle:
        never = args.prompt_tokens + 1
        variants["idle"] = {"keep_ratio": 0.5, "min_prompt_tokens": never, **given}
    for ratio in args.ratios:
        variants[f"keep {ratio:g}"] = {"keep_ratio": ratio, "min_prompt_tokens": 0, **given}
    return variants


def engine_arguments(
    args: argparse.Namespace, model: str, variant: str, settings: dict[str, Any] | None
) -> dict[str, Any]:
    """Arguments of ``LLM``; every variant gets the same bytes of KV cache."""
    blocks = pool_blocks(args)
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": args.dtype,
        "enforce_eager": not args.cuda_graphs,
        "gpu_memory_utilization": 0.4,
        "block_size": args.block_size,
        "max_model_len": args.prompt_tokens + args.output_tokens,
        "max_num_seqs": args.requests,
        "max_num_batched_tokens": args.max_num_batched_tokens,
        "disable_log_stats": True,
        "seed": args.seed,
    }
    if args.cuda_graphs:
        sizes = [1, 2, 4, *range(8, args.requests + 8, 8)]
        arguments["compilation_config"] = {"cudagraph_capture_sizes": sizes}
        if args.without_inductor:
            arguments["compilation_config"]["backend"] = "eager"
    if args.dummy_weights:
        arguments |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if settings is not None:
        arguments["additional_config"] = {"kvzip": settings}
    if variant == FP8:
        blocks *= BYTES_OF_DTYPE[args.dtype]
        arguments["kv_cache_dtype"] = "fp8"
    return {**arguments, "num_gpu_blocks_override": blocks + 1}  # one is vLLM's null block


def prepare_model(args: argparse.Namespace, folder: Path) -> tuple[str, str, dict[str, Any]]:
    """Where the model lies, what it is in words, and its configuration.

    Raises:
        ValueError: when ``--layers`` does not fit.
    """
    if args.shape is not None:
        config = SHAPES[args.shape]
    else:
        config = json.loads((args.model / "config.json").read_text())
        if not args.dummy_weights:
            return str(args.model), f"{args.model.name}: {in_words(config)}", config
    tokens = args.prompt_tokens + args.output_tokens
    words = write_shape(folder, config, args.layers, tokens)
    name = args.shape or args.model.name
    note = SHAPE_NOTES.get(name if args.shape else "", "")
    about = f"shape {name}, random weights: {words}" + (f" ({note})" if note else "")
    return str(folder), about, json.loads((folder / "config.json").read_text())


def pool_bytes(args: argparse.Namespace, config: dict[str, Any]) -> int:
    """Bytes of the pool without the null block: keys and values of every layer and KV head."""
    queries = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // queries
    width = 2 * config.get("num_key_value_heads", queries) * size * BYTES_OF_DTYPE[args.dtype]
    return int(pool_blocks(args) * args.block_size * config["num_hidden_layers"] * width)


def report(
    args: argparse.Namespace, about: str, results: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Print the tables; returns what the JSON file holds besides each run."""
    rows = summarise(results)
    share, limit = prefill_limit(rows)
    rate = "all at once" if args.request_rate is None else f"{args.request_rate:g} a second"
    pool = results[STOCK][0]
    heading = (
        f"{about}; {args.dtype}\n{args.requests} requests of {args.prompt_tokens} + "
        f"{args.output_tokens} tokens, {rate}; pool of {pool['pool_blocks']} blocks of "
        f"{args.block_size} tokens ({args.pool_prompts:g} full requests, "
        f"{pool['pool_blocks'] * pool['block_bytes'] / 2**20:.0f} MiB), steps of up to "
        f"{args.max_num_batched_tokens} tokens; scorer {args.scorer or 'default'}, budget "
        f"{args.budget or 'default'}, prefill budget {args.prefill_budget or 'none'}, decode "
        f"budget {args.decode_budget or 'none'}; medians of {args.rounds} rounds"
    )
    print(f"{heading}\n\n{table(rows)}\n")
    if args.profile:
        print(f"{profile_table(results)}\n")
    print(
        f"Reading prompts is {share:.0%} of stock vLLM's time: with everything else free, "
        f"throughput would be {limit:.2f} times stock's.\n\n{versions()}"
    )
    return {
        "about": heading,
        "versions": versions(),
        "rows": rows,
        "prefill_share_of_stock": share,
        "runs": results,
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", type=Path, help="folder of a model")
    what.add_argument("--shape", choices=list(SHAPES), help="built in; default: attention")
    parser.add_argument(
        "--dummy-weights", action="store_true", help="--model needs a config.json only"
    )
    parser.add_argument("--layers", type=int, help="cut a model of random weights to so many")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--pool-prompts", type=float, default=4, help="pool, in full requests")
    parser.add_argument("--request-rate", type=float, help="a second, Poisson; default: at once")
    parser.add_argument("--ratios", type=float, nargs="+", default=list(KEEP_RATIOS))
    parser.add_argument("--with-idle", action="store_true", help="plugin on, nothing to compress")
    parser.add_argument("--without-fp8", action="store_true", help="leave vLLM's fp8 cache out")
    parser.add_argument("--scorer", help="default: the plugin's")
    parser.add_argument("--budget", help="default: the plugin's")
    parser.add_argument("--prefill-budget", type=int, help="tokens; compress while reading")
    parser.add_argument("--decode-budget", type=int, help="tokens; compress while generating")
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE)
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--dtype", choices=list(BYTES_OF_DTYPE), default="float32")
    parser.add_argument("--cuda-graphs", action="store_true", help="on a card: compile and capture")
    parser.add_argument("--without-inductor", action="store_true", help="graphs start sooner")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--output-dir", type=Path, help="takes kv_cache.json and kv_cache.png")
    add_arguments(parser)
    args = parser.parse_args()
    if args.model is None and args.shape is None:
        args.shape = "attention"
    args.dummy_weights = args.dummy_weights or args.shape is not None
    if args.layers is not None and not args.dummy_weights:
        parser.error("--layers cuts a model of random weights; add --dummy-weights")
    if args.model is not None and not (args.model / "config.json").is_file():
        parser.error(f"--model {args.model} is no folder with a config.json")
    return args


def save(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """JSON with every run and its time series, and the plot where matplotlib is installed."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "kv_cache.json").write_text(json.dumps(found) + "\n")
    if find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed (pip install '.[plots]').", file=sys.stderr)
        return
    ratios = {f"keep {ratio:g}": ratio for ratio in args.ratios}
    draw(args.output_dir / "kv_cache.png", found["runs"], found["rows"], ratios)


def main() -> int:
    args = parse_args()
    if args.job:
        answer_job(args.job, run_variant)
    settings = plugin_settings(args)
    load = Load(args.requests, args.prompt_tokens, args.output_tokens, args.request_rate, args.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            model, about, config = prepare_model(args, folder)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        jobs = {
            variant: {
                "engine": engine_arguments(args, model, variant, chosen),
                "load": asdict(load),
                "profile": args.profile,
            }
            for variant, chosen in settings.items()
        }
        space = str(math.ceil(pool_bytes(args, config) / 2**30) + 1)  # GiB
        try:
            results = take_turns(__file__, jobs, args.rounds, folder, VLLM_CPU_KVCACHE_SPACE=space)
        except subprocess.CalledProcessError as error:
            print(f"An engine failed:\n{error.stderr.decode()[-3000:]}", file=sys.stderr)
            return 1
    if fault := nothing_compressed(settings, results):
        print(fault, file=sys.stderr)
        return 1
    found = report(args, about, results)
    if args.output_dir:
        save(args, found)
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
