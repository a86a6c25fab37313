"""Import of a compressed context against its prefill: time, bytes, and the same answers.

    python scripts/benchmark_context_files.py

On the CPU. One engine reads contexts, compresses them, answers questions about each, and exports
them. Another engine, in a process of its own, imports each file and answers the same questions; in
the same rounds it also prefills contexts of its own, as it would without files. Printed are
medians and quartiles, bytes, and whether all answers are the same tokens. Without ``--model`` it is
a model of realistic attention shape with dummy weights, which are equal in both engines.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.dummy_model import MODEL_CONFIG
from benchmarks.engine_turns import answer_job, take_turn
from vllm_kvzip.evaluation.engines import versions

QUESTIONS, QUESTION_TOKENS, ANSWER_TOKENS = 2, 32, 16


def tokens(seed: int, count: int) -> list[int]:
    """Some token ids that every model has."""
    found: list[int] = np.random.default_rng(seed).integers(7, 500, count).tolist()
    return found


def generate(llm: Any, prompt: list[int], context_tokens: int, max_tokens: int) -> dict[str, Any]:
    """Tokens, seconds until the first one, and how many of the prompt were cached."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False,
        extra_args={"kvzip_context_tokens": context_tokens},
    )  # fmt: skip
    engine = llm.llm_engine
    begin, first, found, cached = time.perf_counter(), 0.0, [], 0
    engine.add_request(f"{begin}", {"prompt_token_ids": prompt}, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            first = first or time.perf_counter() - begin
            found = list(output.outputs[0].token_ids)
            cached = output.num_cached_tokens or 0
    return {"tokens": found, "seconds": first, "cached": cached}


def run_once(job: dict[str, Any]) -> dict[str, Any]:
    """One engine: exports, or imports."""
    import torch
    from vllm import LLM

    from vllm_kvzip.planning.prefix_seed import checksum, prefix_seed
    from vllm_kvzip.vllm_bridge.contexts.calls import export_context, import_context

    length = job["context_tokens"]
    dummy = {"load_format": "dummy", "skip_tokenizer_init": True} if job["dummy"] else {}
    llm = LLM(
        model=job["model"], dtype=job["dtype"], enforce_eager=True, gpu_memory_utilization=0.4,
        max_num_batched_tokens=4096, max_model_len=length + 512, **dummy,
        additional_config={"kvzip": {**job["settings"], "contexts_dir": job["folder"]}},
    )  # fmt: skip
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    (group,) = cache.kv_cache_config.kv_cache_groups
    block_bytes = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    generate(llm, tokens(10_000, length), length, 2)  # warm
    rounds = []
    for number in range(job["rounds"]):
        context, begin = tokens(number, length), time.perf_counter()
        if job["imports"]:
            told = import_context(llm, f"context-{number}")
            seconds = time.perf_counter() - begin
            prefill = generate(llm, tokens(20_000 + number, length), length, 2)
        else:
            prefill = generate(llm, context, length, 2)
            boundary = length // group.kv_cache_spec.block_size * group.kv_cache_spec.block_size
            begin = time.perf_counter()
            told = export_context(
                llm, checksum(prefix_seed(context, boundary)), f"context-{number}"
            )
            seconds = time.perf_counter() - begin
        asked = [
            tokens(30_000 + number * QUESTIONS + one, QUESTION_TOKENS) for one in range(QUESTIONS)
        ]
        answers = [generate(llm, [*context, *one], length, ANSWER_TOKENS) for one in asked]
        rounds.append(
            {
                "seconds": seconds, "prefill": prefill["seconds"], "bytes": told["bytes"],
                "cache_bytes": told["blocks_before"] * block_bytes,
                "answers": [one["tokens"] for one in answers],
                "question": answers[0]["seconds"],
                "cached": [one["cached"] for one in answers],
                "compressed_tokens": told["compressed_tokens"],
            }
        )  # fmt: skip
    return {"rounds": rounds, "threads": torch.get_num_threads()}


def row(name: str, seconds: list[float]) -> str:
    """One line of the table."""
    low, middle, high = np.quantile(seconds, [0.25, 0.5, 0.75]) * 1e3
    return f"{name:>30} | {middle:11.1f} | {low:.1f} to {high:.1f}"


def report(left: dict[str, Any], came: dict[str, Any], args: argparse.Namespace) -> str:
    """What both engines did."""
    out, back = left["rounds"], came["rounds"]
    pairs = [
        (a, b)
        for x, y in zip(out, back, strict=True)
        for a, b in zip(x["answers"], y["answers"], strict=True)
    ]
    same = sum(a == b for a, b in pairs)
    cached = {number for one in back for number in one["cached"]}
    ratios = [one["seconds"] / one["prefill"] for one in back]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    size, whole = back[0]["bytes"], back[0]["cache_bytes"]
    lines = [
        f"context of {args.context_tokens} tokens, {json.dumps(args.settings)}, {args.dtype}, "
        f"{len(back)} rounds, {came['threads']} threads",
        "",
        f"{'':>30} | median (ms) | quartiles (ms)",
        row("prefill, first token", [one["prefill"] for one in back]),
        row("import", [one["seconds"] for one in back]),
        row("export", [one["seconds"] for one in out]),
        row("question after the import", [one["question"] for one in back]),
        "",
        f"import / prefill of a round: {middle:.4f} ({low:.4f} to {high:.4f})",
        f"bytes of the file: {size:,}; of the context's KV cache: {whole:,}; "
        f"ratio {size / whole:.3f}",
        f"tokens of the context that the other engine found cached: {sorted(cached)} of "
        f"{back[0]['compressed_tokens']}",
        f"answers with the same tokens: {same} of {len(pairs)}, "
        f"{len({tuple(a) for a, _ in pairs})} of them different from each other",
        "",
        versions(),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder; default: dummy weights")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context-tokens", type=int, default=2048)
    parser.add_argument("--settings", type=json.loads, default={"keep_ratio": 0.3})
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        answer_job(args.job, run_once)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(MODEL_CONFIG))
        job = {
            "model": args.model or name, "dummy": args.model is None, "dtype": args.dtype,
            "context_tokens": args.context_tokens, "settings": args.settings,
            "rounds": args.rounds, "folder": str(folder / "contexts"),
        }  # fmt: skip
        left, came = (
            take_turn(__file__, {**job, "imports": imports}, folder / "answer.json")
            for imports in (False, True)
        )
    print(report(left, came, args))
    same = all(
        x["answers"] == y["answers"] for x, y in zip(left["rounds"], came["rounds"], strict=True)
    )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
