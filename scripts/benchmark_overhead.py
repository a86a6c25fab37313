"""What the plugin costs where it saves nothing, against stock vLLM.

    python scripts/benchmark_overhead.py

Three engines in one process: stock vLLM, the plugin with every prompt below its threshold ("idle"),
and the plugin at keep ratio 1.0, where all goes through the machinery and nothing is evicted. Each
has room for all of its requests. They get the same requests and take turns **step by step**, in
changing order, so what slows the machine down slows all three down; on a machine whose speed varies
by a tenth between processes nothing else shows a difference of a hundredth.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.kv_cache_run import WARM_UP_PROMPTS, Load
from benchmarks.kv_cache_shapes import SHAPE_NOTES, SHAPES, in_words, write_shape
from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

os.environ.update({**CPU_ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})

from vllm_kvzip.evaluation.engines import BLOCK_SIZE, counter, versions

VARIANTS = ("stock", "idle", "keep 1.0")


def start_engines(folder: str, args: argparse.Namespace) -> dict[str, Any]:
    """Stock vLLM first: the plugin registers its attention for the whole process."""
    from vllm import LLM

    longest = args.prompt_tokens + args.output_tokens
    blocks = args.concurrency * 2 * math.ceil(longest / BLOCK_SIZE)
    settings: dict[str, dict[str, Any]] = {
        "stock": {},
        "idle": {"kvzip": {"min_prompt_tokens": args.prompt_tokens + 1}},
        "keep 1.0": {"kvzip": {"keep_ratio": 1.0, "min_prompt_tokens": 0}},
    }
    return {
        name: LLM(
            model=folder,
            dtype="float32",
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            gpu_memory_utilization=0.2,
            block_size=BLOCK_SIZE,
            max_model_len=longest,
            max_num_seqs=args.concurrency,
            max_num_batched_tokens=2048,
            num_gpu_blocks_override=blocks,
            disable_log_stats=True,
            additional_config=additional,
        ).llm_engine
        for name, additional in settings.items()
    }


def run_round(engines: dict[str, Any], load: Load, seed: int) -> dict[str, float]:
    """Seconds each engine needs for the same requests; fresh prompts for every ``seed``."""
    from vllm import SamplingParams

    prompts = replace(load, seed=seed).prompts()[WARM_UP_PROMPTS:]
    params = SamplingParams(
        temperature=0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=False
    )
    for engine in engines.values():
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params.clone())
    seconds = dict.fromkeys(engines, 0.0)
    turn = list(engines)
    while any(engines[name].has_unfinished_requests() for name in turn):
        for name in turn:
            if engines[name].has_unfinished_requests():
                begin = time.perf_counter()
                engines[name].step()
                seconds[name] += time.perf_counter() - begin
        turn.append(turn.pop(0))
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="step")
    parser.add_argument("--requests", type=int, default=32, help="in each round")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    load = Load(args.requests, args.prompt_tokens, args.output_tokens, None, 0)
    with tempfile.TemporaryDirectory() as name:
        write_shape(Path(name), SHAPES[args.shape], None, args.prompt_tokens + args.output_tokens)
        engines = start_engines(name, args)
    run_round(engines, Load(args.concurrency, args.prompt_tokens, 3, None, 0), 1000)
    before = counter("requests_compressed_total")
    rounds = [run_round(engines, load, 1 + number) for number in range(args.rounds)]
    if counter("requests_compressed_total") - before != args.rounds * args.requests:
        print("Not every prompt of keep ratio 1.0 was compressed.", file=sys.stderr)
        return 1
    print(
        f"shape {args.shape}: {in_words(SHAPES[args.shape])} ({SHAPE_NOTES[args.shape]})\n"
        f"{args.requests} requests of {args.prompt_tokens} + {args.output_tokens} tokens, "
        f"{args.concurrency} at a time; medians of {args.rounds} rounds\n"
    )
    print("| variant | tokens/s | throughput / stock | lowest | highest |")
    print("|---|---|---|---|---|")
    for name in VARIANTS:
        tokens = args.requests * args.output_tokens
        rate = statistics.median(tokens / seconds[name] for seconds in rounds)
        ratios = [seconds["stock"] / seconds[name] for seconds in rounds]
        print(
            f"| {name} | {rate:.0f} | {statistics.median(ratios):.3f} | {min(ratios):.3f} "
            f"| {max(ratios):.3f} |"
        )
    print(f"\n{versions()}")
    sys.stdout.flush()
    os._exit(0)  # vLLM's own shutdown costs seconds


if __name__ == "__main__":
    sys.exit(main())
