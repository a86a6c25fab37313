"""What does scoring cost? Time of each scorer as a share of the prefill, on the CPU, in one run.

    python scripts/benchmark_scoring.py

Four layers of the shape of Llama 3.2 1B, with dummy weights, read one prompt after the other, in an
engine per scorer; scorers take turns. Both the prefill and the scoring grow with the number of
layers, so their ratio is that of the whole model, except for the vocabulary. Printed are medians of
each stage of the compression as shares of the time that the same engine's prefill took. Scorer
``surrogate`` gets networks of random weights: they cost the same.
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

SHAPE = {
    **MODEL_CONFIG,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
}
STAGES = ("score", "select", "compact")
SCORERS = ("contrast", "surrogate", "window", "expected-attention", "kvzip")
WIDTH = 16


def write_model(folder: Path) -> None:
    """The model's configuration, a profile that fits it, and random networks beside it."""
    import torch

    from vllm_kvzip.head_profiles.head_profile import (
        HeadProfile,
        ModelFingerprint,
        Provenance,
        save_profile,
    )
    from vllm_kvzip.head_profiles.networks import RECENCY_TOKENS, LayerSurrogate, save_surrogate

    (folder / "config.json").write_text(json.dumps(SHAPE))
    layers, heads = SHAPE["num_hidden_layers"], SHAPE["num_key_value_heads"]
    model = ModelFingerprint(
        architecture=SHAPE["architectures"][0],
        num_layers=layers,
        num_query_heads=SHAPE["num_attention_heads"],
        num_kv_heads=heads,
        head_dim=SHAPE["head_dim"],
    )
    grid = [[0.5] * heads] * layers
    made = Provenance(method="for a benchmark", texts=[], versions={}, created="")
    profile = HeadProfile(
        schema_version=1, model=model, provenance=made, importance=grid, budgets={"0.5": grid}
    )
    save_profile(profile, folder / "profile.json")
    inputs = 2 * model.head_dim + len(RECENCY_TOKENS)
    shapes = ((heads, inputs, WIDTH), (heads, WIDTH), (heads, WIDTH), (heads,))
    networks = [LayerSurrogate(*(torch.randn(s) * 0.01 for s in shapes)) for _ in range(layers)]
    save_surrogate(folder / "profile.safetensors", networks, model, {})


def run_once(job: dict[str, Any]) -> dict[str, float]:
    """One engine: median seconds of a prefill and of each stage of the compression after it."""
    import numpy as np
    from vllm import LLM, SamplingParams

    settings = {
        "keep_ratio": 0.3,
        "scorer": job["scorer"],
        "budget": "adaptive",
        "profile": f"{job['model']}/profile.json",
        "scoring_chunk_tokens": job["chunk_tokens"],
    }
    llm = LLM(
        model=job["model"],
        tokenizer=str(TOKENIZER),
        dtype=job["dtype"],
        load_format="dummy",
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.4,
        block_size=32,
        max_num_batched_tokens=job["prompt_tokens"],
        additional_config={"kvzip": settings},
    )
    engine = llm.llm_engine
    rng = np.random.default_rng(0)
    sampling = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    found: dict[str, list[float]] = {name: [] for name in ("prefill", *STAGES)}
    for number in range(job["prompts"] + 1):
        before = {stage: stage_seconds(stage) for stage in STAGES}
        prompt = rng.integers(7, 1000, job["prompt_tokens"]).tolist()
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        begin = time.perf_counter()
        engine.step()
        found["prefill"].append(time.perf_counter() - begin)
        while engine.has_unfinished_requests():
            engine.step()
        for stage in STAGES:
            found[stage].append(stage_seconds(stage) - before[stage])
    if not all(found["compact"]):
        raise RuntimeError("compression did not run")
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def stage_seconds(stage: str) -> float:
    """Seconds all compressions so far spent in a stage."""
    return counter("compress_seconds_sum", stage=stage)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, default=2048)
    parser.add_argument("--prompts", type=int, default=6, help="of each engine, after a first one")
    parser.add_argument("--scorers", nargs="+", default=list(SCORERS))
    parser.add_argument(
        "--chunk-tokens", type=int, nargs="+", default=[512], help="of scorer kvzip"
    )
    parser.add_argument("--dtype", default="bfloat16")
    add_arguments(parser)
    args = parser.parse_args()
    if args.job:
        answer_job(args.job, run_once)
    variants = [
        (scorer, chunk)
        for scorer in args.scorers
        for chunk in (args.chunk_tokens if scorer == "kvzip" else args.chunk_tokens[:1])
    ]
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        jobs = {
            (scorer, chunk): {
                **vars(args), "model": folder, "scorer": scorer, "chunk_tokens": chunk,
            }
            for scorer, chunk in variants
        }  # fmt: skip
        results = take_turns(__file__, jobs, args.rounds, Path(folder))
    print(
        f"prompts of {args.prompt_tokens} tokens, one at a time, {args.dtype}, keep ratio 0.3; "
        f"shares of the prefill's time, medians of {args.rounds} rounds\n\n"
        f"{'scorer':>24} |  score | select | compact"
    )
    for (scorer, chunk), runs in results.items():
        name = f"{scorer}, chunks of {chunk}" if scorer == "kvzip" else scorer
        shares = [statistics.median(run[s] / run["prefill"] for run in runs) for s in STAGES]
        print(f"{name:>24} | {shares[0]:6.1%} | {shares[1]:6.1%} | {shares[2]:7.1%}")
    prefill = statistics.median(run["prefill"] for runs in results.values() for run in runs)
    print(f"\nprefill {prefill * 1e3:.0f} ms; {versions()}")


if __name__ == "__main__":
    main()
