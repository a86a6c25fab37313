"""How long do others wait while a long prompt is compressed? Token gaps of a stream that decodes.

    python scripts/benchmark_gaps.py

A request decodes, and a long prompt arrives. The longest gap between two tokens of the first is
measured while the second is read uncompressed, where it is that of a full prefill step, and while
it is read and compressed. Both are asked of one engine and take turns; printed are medians over
the rounds. Scorer ``kvzip``, the default here, lets the model read every prompt twice.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from real_model import ModelUnavailable, real_model

from vllm_kvzip.evaluation.engines import counter, start_engine, versions
from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

PLAIN, COMPRESSED = "uncompressed", "compressed"
STREAM_TOKENS = 4  # before the prompt arrives
ANSWER_TOKENS = 4
FIRST_TOKEN, LAST_TOKEN = 7, 200


def gaps_around(engine: Any, prompt: list[int], name: str, options: dict[str, Any]) -> list[float]:
    """Seconds between the tokens of a stream, from a prompt's arrival to its last token.

    Args:
        engine: vLLM's ``LLMEngine``, in this process.
        prompt: token ids.
        name: of this turn.
        options: of the prompt's request.
    """
    from vllm import SamplingParams

    def params(num_tokens: int, **extra: Any) -> Any:
        return SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False,
            extra_args=extra,
        )  # fmt: skip

    stream, asked = f"stream-{name}", f"prompt-{name}"
    short = {"prompt_token_ids": prompt[:16], "cache_salt": name}
    engine.add_request(stream, short, params(4096, kvzip="off"))
    num_tokens = 0
    while num_tokens < STREAM_TOKENS:
        num_tokens += len(engine.step())
    engine.add_request(
        asked, {"prompt_token_ids": prompt, "cache_salt": name}, params(ANSWER_TOKENS, **options)
    )
    gaps, last, is_over = [], time.perf_counter(), False
    while not is_over:
        outputs = engine.step()
        now = time.perf_counter()
        if any(output.request_id == stream for output in outputs):
            gaps.append(now - last)
            last = now
        is_over = any(output.request_id == asked and output.finished for output in outputs)
    engine.abort_request([stream])
    while engine.has_unfinished_requests():
        engine.step()
    return gaps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder; default: SmolLM2-135M-Instruct, made if missing")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--scorer", default="kvzip")
    parser.add_argument("--keep-ratio", type=float, default=0.3)
    parser.add_argument("--context-tokens", type=int, nargs="+", default=[1900, 3800, 7600])
    parser.add_argument("--max-num-batched-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    try:
        model = args.model or str(real_model())
    except ModelUnavailable as error:
        print(error, file=sys.stderr)
        return 2
    os.environ.update({**CPU_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **os.environ})

    engine = start_engine(
        model,
        {"scorer": args.scorer, "keep_ratio": args.keep_ratio},
        dtype=args.dtype,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=max(args.context_tokens) + 64,
    ).llm_engine
    rng = np.random.default_rng(0)
    print(
        f"{Path(model).name}, {args.dtype}, scorer {args.scorer}, steps of up to "
        f"{args.max_num_batched_tokens} tokens, {args.rounds} rounds; longest gap of a stream, ms"
        f"\n\n| prompt tokens | {PLAIN} | {COMPRESSED} | ratio |\n|---|---|---|---|"
    )
    for num_tokens in args.context_tokens:
        longest: dict[str, list[float]] = {PLAIN: [], COMPRESSED: []}
        for number in range(args.rounds + 1):  # the first warms up
            prompt = rng.integers(FIRST_TOKEN, LAST_TOKEN, num_tokens).tolist()
            for kind, options in ((PLAIN, {"kvzip": "off"}), (COMPRESSED, {})):
                before = counter("requests_compressed_total")
                gaps = gaps_around(engine, prompt, f"{kind}-{num_tokens}-{number}", options)
                if counter("requests_compressed_total") - before != (kind == COMPRESSED):
                    print(f"A prompt that was to be {kind} was not.", file=sys.stderr)
                    return 1
                longest[kind].append(max(gaps))
        plain, compressed = (np.array(longest[kind][1:]) for kind in (PLAIN, COMPRESSED))
        print(
            f"| {num_tokens} | {np.median(plain) * 1e3:.0f} | {np.median(compressed) * 1e3:.0f} | "
            f"{np.median(compressed / plain):.2f} |",
            flush=True,
        )
    print(f"\n{versions()}", flush=True)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # vLLM's own shutdown costs seconds
