"""Tokens per second with prompt lookup (ngram speculation), with and without compression.

    python scripts/benchmark_prompt_lookup.py

On the CPU, with a real language model that is asked to repeat a text: what it writes stands in its
prompt, so that n-grams of the prompt guess it well. Stock vLLM and the plugin each answer with and
without speculation, in engines of their own that take turns. Printed are medians of the rounds'
ratios to stock without speculation, and how many tokens a request gets in a decode step. Ends
with an error if speculation changes a token of greedy answers by more than ties can explain.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from real_model import real_model

from benchmarks.engine_turns import add_arguments, answer_job, take_turns
from vllm_kvzip.evaluation.engines import counter, versions

TEXT = Path(__file__).parent.parent / "profiles" / "calibration.txt"
ASK = "Repeat the following text word for word.\n\n{text}"
LOOKUP = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}
LEAST_EQUAL = 0.9  # share of answers' tokens; blocks of several tokens round otherwise


def run_once(job: dict[str, Any]) -> dict[str, Any]:
    """One engine: what it answered, seconds of its decode steps, and how many tokens they made."""
    from vllm import LLM, SamplingParams

    settings = {"keep_ratio": job["keep_ratio"], "min_prompt_tokens": 128}
    llm = LLM(
        model=job["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=2048,
        block_size=32,
        seed=0,
        speculative_config=LOOKUP if job["lookup"] else None,
        additional_config={} if job["keep_ratio"] is None else {"kvzip": settings},
    )
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    sampling = SamplingParams(
        temperature=0, max_tokens=job["output_tokens"], ignore_eos=True, detokenize=False
    )
    warm_up = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
    engine.add_request("warm-up", {"prompt_token_ids": [7, 8, 9] * 30}, warm_up)
    while engine.has_unfinished_requests():  # the lookup is compiled when it is first needed
        engine.step()
    for number, text in enumerate(job["texts"]):
        words = tokenizer.decode(tokenizer.encode(text)[: job["text_tokens"]])
        chat = [{"role": "user", "content": ASK.format(text=words)}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    made: dict[str, list[int]] = {}
    seconds, steps, tokens = 0.0, 0, 0
    while engine.has_unfinished_requests():
        before = sum(map(len, made.values()))
        decoding = len(made)
        begin = time.perf_counter()
        outputs = engine.step()
        spent = time.perf_counter() - begin
        made |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs}
        if decoding == len(job["texts"]):  # all prompts have been read
            seconds += spent
            steps += sum(not output.finished for output in outputs)
            tokens += sum(map(len, made.values())) - before
    compressed = counter("requests_compressed_total")
    if (job["keep_ratio"] is not None) != bool(compressed):
        raise RuntimeError("compression did not run where it should, or the other way round")
    return {
        "tokens": [made[str(number)] for number in range(len(made))],
        "per_second": tokens / seconds,
        "per_step": tokens / max(1, steps),
    }


def equal_share(found: list[list[int]], expected: list[list[int]]) -> float:
    """Share of tokens up to the first that differs, of all answers."""
    same = 0
    for mine, theirs in zip(found, expected, strict=True):
        differs = (i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        same += next(differs, len(mine))
    return same / sum(map(len, expected))


def texts(count: int) -> list[str]:
    """Passages of the calibration text that ships, as far from each other as can be."""
    text = TEXT.read_text()
    return [text[len(text) * number // (count + 1) :] for number in range(count)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="default: SmolLM2-135M-Instruct (make model)")
    parser.add_argument("--requests", type=int, default=4)
    parser.add_argument("--text-tokens", type=int, default=400)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    add_arguments(parser)
    args = parser.parse_args()
    if args.job:
        answer_job(args.job, run_once)
    shared = {
        "model": str(args.model or real_model()), "texts": texts(args.requests),
        "text_tokens": args.text_tokens, "output_tokens": args.output_tokens,
    }  # fmt: skip
    jobs = {
        (ratio, lookup): {**shared, "keep_ratio": ratio, "lookup": lookup}
        for ratio in (None, args.keep_ratio)
        for lookup in (False, True)
    }
    with tempfile.TemporaryDirectory() as folder:
        found = take_turns(__file__, jobs, args.rounds, Path(folder), VLLM_CPU_KVCACHE_SPACE="2")
    print(
        f"{args.requests} requests that repeat {args.text_tokens} tokens, {args.output_tokens} "
        f"tokens each, {Path(shared['model']).name}, float32; medians of {args.rounds} rounds\n\n"
        f"engine | tokens per second / stock | tokens a request and step | equal to no lookup"
    )
    base = found[None, False]
    failed = False
    for (ratio, lookup), runs in found.items():
        rates = [run["per_second"] / own["per_second"] for run, own in zip(runs, base, strict=True)]
        equal = equal_share(runs[0]["tokens"], found[ratio, False][0]["tokens"])
        failed |= equal < LEAST_EQUAL
        name = f"{'stock' if ratio is None else f'keep {ratio:g}'}{' + lookup' * lookup}"
        print(
            f"{name:>18} | {statistics.median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f}) | "
            f"{statistics.median(run['per_step'] for run in runs):.2f} | {equal:.1%}"
        )
    rate = statistics.median(run["per_second"] for run in base)
    print(f"\nstock {rate:.1f} tokens per second; {versions()}")
    if failed:
        print("Speculation changed the answers.")
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
