"""Time to first token on a reused compressed prefix against a fresh prefill, in one run.

    python scripts/benchmark_reuse.py

On the CPU. A model of realistic attention shape with dummy weights. In each round a new context and
a question are prefilled; then another question is asked over the same context, which starts from
its compressed prefix. Printed are medians and quartiles of both, and of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dummy_model import MODEL_CONFIG
from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

HITS = "vllm_kvzip_prefix_hits_total"


def first_token_seconds(engine: Any, name: str, prompt: list[int], context_tokens: int) -> float:
    """Seconds from the request's arrival to its first token; runs it to its end."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=3, ignore_eos=True, detokenize=False,
        extra_args={"kvzip_context_tokens": context_tokens},
    )  # fmt: skip
    begin, first = time.perf_counter(), 0.0
    engine.add_request(name, {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        if engine.step():
            first = first or time.perf_counter() - begin
    return first


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context-tokens", type=int, default=2048)
    parser.add_argument("--question-tokens", type=int, default=32)
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ})

    import vllm
    from prometheus_client import REGISTRY

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODEL_CONFIG))
        engine = vllm.LLM(
            model=folder, dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True,
            enforce_eager=True, gpu_memory_utilization=0.4, max_num_batched_tokens=4096,
            additional_config={"kvzip": {"keep_ratio": args.keep_ratio}},
        ).llm_engine  # fmt: skip
    rng = np.random.default_rng(0)

    def tokens(count: int) -> list[int]:
        found: list[int] = rng.integers(7, 1000, count).tolist()
        return found

    fresh: list[float] = []
    reused: list[float] = []
    for number in range(args.rounds + 1):
        context = tokens(args.context_tokens)
        for kind, seconds in (("fresh", fresh), ("reused", reused)):
            hits = REGISTRY.get_sample_value(HITS) or 0
            prompt = [*context, *tokens(args.question_tokens)]
            name = f"{kind}-{number}"
            seconds.append(first_token_seconds(engine, name, prompt, args.context_tokens))
            hit = (REGISTRY.get_sample_value(HITS) or 0) - hits
            if hit != (kind == "reused"):
                print(f"A {kind} request had {hit:.0f} compressed hits.", file=sys.stderr)
                return 1
    ratios = np.divide(reused[1:], fresh[1:])  # the first round warms up
    print(
        f"context of {args.context_tokens} tokens, question of {args.question_tokens}, "
        f"keep ratio {args.keep_ratio}, bfloat16, {args.rounds} rounds\n\n"
        "first token | median (ms) | quartiles (ms)"
    )
    for kind, seconds in (("fresh", fresh), ("reused", reused)):
        low, middle, high = np.quantile(seconds[1:], [0.25, 0.5, 0.75]) * 1e3
        print(f"{kind:>11} | {middle:11.1f} | {low:.1f} to {high:.1f}")
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    print(f"{'ratio':>11} | {middle:11.3f} | {low:.3f} to {high:.3f}")
    print(
        f"\nvLLM {vllm.__version__}, {platform.machine()} {os.cpu_count()} cores, "
        f"{date.today().isoformat()}"
    )
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    os._exit(main())  # vLLM's own shutdown costs seconds
