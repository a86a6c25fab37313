"""Modes quantize and mixed in real vLLM: blocks that come back, answers that stay right."""

from math import ceil

import numpy as np
import pytest
from engine_job import MODEL, Request, run_job

from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import (
    VOCABULARY,
    copy_prompt,
    make_context,
    question_prompt,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, PAGE = 32, 120  # tokens of an ordinary and of a quantized page, bfloat16
CONTEXT = 1920
BFLOAT16 = {"dtype": "bfloat16", "max_num_batched_tokens": 512}


def declared(num_tokens):
    return {"extra_args": {"kvzip_context_tokens": num_tokens}}


def questions_about(context, count):
    """Prompts and right answers, of facts all over the context."""
    keys = list(context.facts)
    return [question_prompt(context, key) for key in keys[:: len(keys) // count][:count]]


@pytest.fixture(scope="module")
def quantized():
    """A copy task of one prompt, questions about another that was compressed, and more copies."""
    rng = np.random.default_rng(1)
    copies = [
        copy_prompt(make_context(rng, CONTEXT, 0.6), offset, num_answer_tokens=30)
        for offset in (600, 100, 300, 900)
    ]
    context = make_context(rng, 1000, 0.4)
    about = questions_about(context, 12)
    long_tail = make_context(rng, 300, 0.4)
    requests = [
        Request(copies[0][0], 30),
        Request(context.tokens.tolist(), 2, 60, options=declared(1000)),
    ]
    requests += [Request(prompt, 4, 66, options=declared(1000)) for prompt, _ in about]
    behind = [*context.tokens.tolist(), *long_tail.tokens.tolist()]
    requests += [
        Request([*behind, *prompt[1000:]], 4, 90, options=declared(1000)) for prompt, _ in about
    ]
    requests += [Request(prompt, 30, 130 + 50 * n) for n, (prompt, _) in enumerate(copies[1:])]
    settings = {"mode": "quantize", "scorer": "knorm", "profile": "none"}
    answers = [np.array([text[:30] for _, text in copies]), [value for _, value in about]]
    return requests, answers, run_job(requests, kvzip=settings, **BFLOAT16)


def test_a_prompt_in_nf4_holds_a_3_5th_of_stocks_blocks(quantized):
    requests, _, report = quantized
    prompt = len(requests[0].prompt)
    stock = ceil(prompt / BLOCK)
    total = report.free_blocks[0]
    prefilled = next(i for i, free in enumerate(report.free_blocks) if total - free >= stock)
    held = total - report.free_blocks[prefilled + 2]
    prefix = prompt // BLOCK
    assert held == ceil(prefix * BLOCK / PAGE) + stock - prefix == 17
    assert stock / held >= 3.5
    assert report.free_blocks[-1] == total


def test_quantizing_without_eviction_keeps_the_answers(quantized):
    _, (copied, values), report = quantized
    copies = np.array([report.outputs[0], *report.outputs[26:]])
    assert np.mean(copies == copied) > 0.75  # rounding may lead one astray
    assert report.metrics["vllm_kvzip_prefix_hits_total"] == 2 * len(values)
    first = np.array([output[0] for output in report.outputs[2:26]])
    assert np.mean(first[:12] == values) > 0.9
    assert np.mean(first[12:] == values) > 0.8  # many tokens between attend to the prefix as well


def test_metrics_tell_the_tiers(quantized):
    requests, _, report = quantized
    prefixes = [len(requests[0].prompt) // BLOCK * BLOCK] * 4 + [1000 // BLOCK * BLOCK]
    samples = {name.removeprefix("vllm_kvzip_"): n for name, n in report.metrics.items()}
    assert samples["tokens_kept_total/quantized"] == sum(prefixes)
    assert samples["tokens_kept_total/full"] == samples["tokens_evicted_total"] == 0
    assert samples["compress_seconds_count/quantize"] == 5
    freed = sum(n // BLOCK - ceil(n / PAGE) for n in prefixes)
    assert samples["blocks_freed_total"] == freed
    for kind in ("full", "compressed", "quantized"):
        assert samples[f"kv_bytes_held/{kind}"] == 0


def test_blocks_that_held_quantized_pages_harm_nobody():
    """Their bytes are no numbers, and a kernel reads the rest of a block that is filled in part."""
    rng = np.random.default_rng(4)
    short = [make_context(rng, 40, 0.5).tokens.tolist() for _ in range(20)]
    long = [make_context(rng, 1000, 0.5).tokens.tolist() for _ in range(2)]
    requests = [Request(prompt, 3, 5 * number) for number, prompt in enumerate(short)]
    requests += [Request(prompt, 20, 110 + 30 * number) for number, prompt in enumerate(long)]
    requests += [Request(prompt, 3, 180 + 5 * i) for i, prompt in enumerate([*short, *short])]
    report = run_job(
        requests, kvzip={"mode": "quantize"}, num_gpu_blocks_override=50, max_model_len=1100
    )
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == 2
    assert report.outputs[22:42] == report.outputs[42:] == report.outputs[:20]


def test_all_bytes_in_mode_mixed_are_stock():
    rng = np.random.default_rng(2)
    prompts = [make_context(rng, length, 0.5).tokens.tolist() for length in (900, 1001, 200, 640)]
    requests = [Request(prompt, 30, 3 * number) for number, prompt in enumerate(prompts)]
    stock = run_job(requests)
    settings = {"mode": "mixed", "keep_bytes_ratio": 1.0}
    whole = run_job(requests, kvzip=settings)
    assert whole.outputs == stock.outputs
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] == 3
    assert whole.free_blocks[-1] == whole.free_blocks[0]


def test_a_server_in_mode_mixed_says_what_it_holds():
    flags = ["--kv-compression", "kvzip", "--dtype", "bfloat16"]
    for name, value in {"mode": "mixed", "keep_bytes_ratio": "0.125", "full_share": "0.5"}.items():
        flags += [f"--kv-compression-config.{name}", value]
    context = make_context(np.random.default_rng(3), CONTEXT - 4, fact_density=0.2)
    (prompt, value), *_ = questions_about(context, 8)
    with LocalServer(str(MODEL), *flags) as server:
        answer = []
        for piece in server.stream(prompt, 60):
            answer += piece.split()
            if len(answer) == 30:
                samples = server.metrics()
        after = server.metrics()
        assert server.blocks_held() == 0
    assert answer[0] == VOCABULARY.words[value]
    block_bytes = BLOCK * 4 * 4 * 32 * 2 * 2  # tokens, layers, heads, head size, K and V, bfloat16
    prefix = len(prompt) // BLOCK
    total = ceil(prefix / 8)
    full = round(total / 2)
    held = {kind: samples[f'vllm_kvzip_kv_bytes_held{{kind="{kind}"}}'] for kind in
            ("compressed", "quantized")}  # fmt: skip
    assert held == {"compressed": full * block_bytes, "quantized": (total - full) * block_bytes}
    kept = full * BLOCK + (total - full) * PAGE
    assert samples["vllm_kvzip_eviction_ratio"] == pytest.approx(1 - kept / (prefix * BLOCK))
    assert after['vllm_kvzip_tokens_kept_total{tier="full"}'] == full * BLOCK
    assert after['vllm_kvzip_tokens_kept_total{tier="quantized"}'] == (total - full) * PAGE
    assert after['vllm_kvzip_compress_seconds_sum{stage="quantize"}'] > 0
