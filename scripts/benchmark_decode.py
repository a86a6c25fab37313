"""Decode time of compressed prompts against stock vLLM, on the CPU, in one run.

    python scripts/benchmark_decode.py

A model of realistic attention shape with dummy weights decodes a batch of long prompts, once by
stock vLLM and once per keep ratio, in engines of their own that take turns. Printed are medians of
the step time, as ratios to stock, and the time that compression itself took as a share of prefill.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.dummy_model import MODEL_CONFIG, TOKENIZER
from benchmarks.engine_turns import add_arguments, answer_job, take_turns
from vllm_kvzip.evaluation.engines import counter, versions


def run_once(job: dict[str, Any]) -> dict[str, float]:
    """One engine: seconds of prefill, of compression, and median seconds of a decode step."""
    import numpy as np
    from vllm import LLM, SamplingParams

    additional = {}
    if job["keep_ratio"] is not None:
        additional = {"kvzip": {"keep_ratio": job["keep_ratio"], "scorer": job["scorer"]}}
    llm = LLM(
        model=job["model"],
        tokenizer=str(TOKENIZER),
        dtype="bfloat16",
        load_format="dummy",
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.4,
        block_size=32,
        additional_config=additional,
    )
    engine = llm.llm_engine
    rng = np.random.default_rng(0)
    sampling = SamplingParams(
        temperature=0, max_tokens=job["output_tokens"], ignore_eos=True, detokenize=False
    )
    for number in range(job["requests"]):
        prompt = rng.integers(7, 1000, job["prompt_tokens"]).tolist()
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    seconds, decoding = [], []
    while engine.has_unfinished_requests():
        begin = time.perf_counter()
        outputs = engine.step()
        seconds.append(time.perf_counter() - begin)
        decoding.append(len(outputs) == job["requests"])
    first = decoding.index(True) + 3  # every request decodes, and the last one is compressed
    decode = [
        s for s, all_decode in zip(seconds[first:], decoding[first:], strict=True) if all_decode
    ]
    if len(decode) < 20:
        raise RuntimeError("too few steps in which every request decoded; ask for more tokens")
    stages = ("score", "select", "compact")
    compress = sum(counter("compress_seconds_sum", stage=stage) for stage in stages)
    if additional and not compress:
        raise RuntimeError("compression did not run")
    prefill = sum(seconds[:first]) - compress
    return {"prefill": prefill, "compress": compress, "step": statistics.median(decode)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--output-tokens", type=int, default=60)
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--scorer", default="keydiff")
    add_arguments(parser)
    args = parser.parse_args()
    if args.job:
        answer_job(args.job, run_once)
    variants = [None, *args.keep_ratios]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL_CONFIG))
        results = take_turns(
            __file__,
            {
                variant: {**vars(args), "model": folder, "keep_ratio": variant}
                for variant in variants
            },
            args.rounds,
            Path(folder),
            VLLM_CPU_KVCACHE_SPACE="4",  # GiB: all requests fit uncompressed, nobody waits
        )
    stock = statistics.median(run["step"] for run in results[None])
    print(
        f"{args.requests} requests of {args.prompt_tokens} tokens, scorer {args.scorer}, bfloat16, "
        f"medians of "
        f"{args.rounds} rounds\n\nkeep ratio | decode step / stock | compression / prefill"
    )
    for variant in variants:
        step = statistics.median(run["step"] for run in results[variant])
        share = statistics.median(run["compress"] / run["prefill"] for run in results[variant])
        name = "stock" if variant is None else f"{variant:g}"
        print(f"{name:>10} | {step / stock:19.2f} | {share:.1%}")
    print(f"\nstock step {stock * 1e3:.0f} ms; {versions()}")


if __name__ == "__main__":
    main()
