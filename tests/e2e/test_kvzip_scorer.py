"""Scorer kvzip inside the engine: right scores, no trace, and what it is good for."""

import itertools

import numpy as np
import pytest
import torch
from engine_job import MODEL, Request, run_job
from engine_scores import engine_scores
from faults import REPEAT_FAULT

from vllm_kvzip.evaluation.quality.rows import settings_of
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, make_context, question_prompt
from vllm_kvzip.planning.prefix_seed import prefix_seed
from vllm_kvzip.profiling.reconstruction_probe import ReconstructionProbe

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

REPEAT = [VOCABULARY.ids["repeat"]]  # the wording of the tiny model's profile


@pytest.mark.parametrize(("chunk_tokens", "compiled"), [(2048, False), (200, False), (2048, True)])
def test_scores_equal_those_of_plain_transformers(tmp_path, chunk_tokens, compiled):
    rng = np.random.default_rng(1)
    prompts = [make_context(rng, n).tokens.tolist() for n in (512, 700, 300)]
    settings = {"scorer": "kvzip", "keep_ratio": 0.5, "scoring_chunk_tokens": chunk_tokens}
    scores, passes = engine_scores(
        tmp_path, prompts, settings, enforce_eager=not compiled, max_num_batched_tokens=2048,
        max_model_len=710,  # a context is repeated behind itself, not where requests must end
    )  # fmt: skip
    assert len(scores) == 3
    if chunk_tokens == 2048:
        assert passes == [3]  # all prompts in one pass
    probe = ReconstructionProbe(str(MODEL))
    link = 1 + 8  # repeat prompt and the end of the previous chunk count as well
    for prompt in prompts:
        prefix = prompt[: len(prompt) // 32 * 32]
        got = scores[prefix_seed(prefix, len(prefix))]
        wanted = probe.score(prefix, chunk_tokens - link, REPEAT, REPEAT, local=True)
        torch.testing.assert_close(got, wanted, atol=2e-4, rtol=1e-3)


def test_scoring_leaves_no_trace():
    rng = np.random.default_rng(2)
    shared = make_context(rng, 500).tokens.tolist()
    lengths = (300, 40, 700, 256, 33, 400)
    prompts = [shared + make_context(rng, length).tokens.tolist() for length in lengths]
    prompts += [make_context(rng, length).tokens.tolist() for length in (1000, 64, 1900)]
    requests = [
        Request(prompt, 40, arrives=3 * number, options={"logprobs": 0})
        for number, prompt in enumerate(prompts)
    ]
    settings = {"keep_ratio": 1.0, "prefix_reuse": "raw"}
    stock = run_job(requests)
    silent = run_job(requests, kvzip={**settings, "scorer": "streaming"})
    scored = run_job(requests, kvzip={**settings, "scorer": "kvzip"})
    assert scored.outputs == stock.outputs
    assert scored.cached_tokens == stock.cached_tokens
    assert scored.free_blocks == silent.free_blocks
    for got, wanted in zip(scored.logprobs, stock.logprobs, strict=True):
        assert got == pytest.approx(wanted, abs=1e-4)
    assert scored.metrics["vllm_kvzip_compress_seconds_sum/score"] > 0


@pytest.mark.parametrize("asynchronous", [False, True], ids=["", "asynchronous"])
def test_a_long_context_is_repeated_over_several_steps(asynchronous):
    rng = np.random.default_rng(4)
    lengths = (40, 1000, 900, 260, 1024, 640)
    prompts = [make_context(rng, length).tokens.tolist() for length in lengths]
    requests = [Request(prompt, 60, arrives=2 * number) for number, prompt in enumerate(prompts)]
    requests[4].aborts = 16  # while it waits, or is read
    requests[5].fault = REPEAT_FAULT
    engine = {"max_num_batched_tokens": 256, "asynchronous": asynchronous}
    report = run_job(requests, kvzip={"keep_ratio": 1.0, "scorer": "kvzip"}, **engine)
    requests[5].fault = None
    stock = run_job(requests, **engine)
    aborted = [requests[4]]
    for request, got, wanted in zip(requests, report.outputs, stock.outputs, strict=True):
        assert got == (wanted[: len(got)] if request in aborted else wanted)
    stream = [step["0"] for step in report.computed_tokens if "0" in step]
    assert [b - a for a, b in itertools.pairwise(stream)] == [1] * (len(stream) - 1)
    waited = [step["1"] for step in report.computed_tokens if "1" in step].count(999)
    assert waited >= 4  # 1,000 tokens and five repeat prompts, 256 tokens a step
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == 3
    assert report.metrics["vllm_kvzip_requests_skipped_total/failed"] == 1
    assert report.free_blocks[-1] == report.free_blocks[0]


def test_it_answers_where_other_scorers_fail():
    """Questions over a context of which a fifth is kept, compressed before they are read.

    The surrogate is promised for keep ratio 0.3.
    """
    context = make_context(np.random.default_rng(3), 1024, fact_density=0.3)
    keys = list(context.facts)[::3]
    declared = {"extra_args": {"kvzip_context_tokens": 1024}}
    requests = [Request(context.tokens.tolist(), 2, options=declared)]
    expected = []
    for key in keys:
        prompt, value = question_prompt(context, key)
        requests.append(Request(prompt, 1, arrives=6, options=declared))
        expected.append(value)
    shares = {}
    blocks = set()
    rows = ("kvzip", "kvzip+adaptive-per-layer", "kvzip+uniform", "keydiff")
    for name, ratio in (*((row, 0.2) for row in rows), ("surrogate", 0.3)):
        report = run_job(requests, kvzip=settings_of(name, ratio))
        answers = [output[0] for output in report.outputs[1:]]
        shares[name] = np.mean([a == b for a, b in zip(answers, expected, strict=True)])
        if ratio == 0.2:
            blocks.add(report.metrics["vllm_kvzip_blocks_freed_total"])
    assert len(blocks) == 1  # the same memory for all of them
    assert shares["kvzip"] >= 0.98
    assert shares["surrogate"] >= 0.95 * shares["kvzip"]
    assert shares["kvzip"] > shares["keydiff"] + 0.1
    assert shares["kvzip"] > shares["kvzip+adaptive-per-layer"] + 0.2
    assert shares["kvzip"] > shares["kvzip+uniform"] + 0.2
