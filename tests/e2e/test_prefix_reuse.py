"""One compressed context, many questions: what later requests find in the prefix cache."""

from math import ceil

import numpy as np
import pytest
from engine_job import Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context, question_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, CONTEXT, CHUNK = 32, 1024, 512
QUESTION_LENGTHS = (1, 2, 31, 32, 33, 64, 70, 100, 5, 20)


def declared(num_tokens):
    return {"extra_args": {"kvzip_context_tokens": num_tokens}}


def document(num_tokens=CONTEXT, seed=1):
    rng = np.random.default_rng(seed)
    context = make_context(rng, num_tokens).tokens.tolist()
    questions = [make_context(rng, max(3, n)).tokens.tolist()[:n] for n in QUESTION_LENGTHS]
    return context, questions


def total(report, name):
    return report.metrics["vllm_kvzip_" + name]


@pytest.fixture(
    scope="module",
    params=[{"keep_ratio": 0.25}, {"mode": "mixed", "keep_bytes_ratio": 0.25, "full_share": 0.6}],
    ids=["evict", "mixed"],
)
def settings(request):
    return request.param


@pytest.fixture(scope="module")
def ten_questions(settings):
    """The context alone, then ten questions at once; three of them are aborted at some time."""
    context, questions = document()
    requests = [Request(context, 2, options=declared(CONTEXT))]
    for number, question in enumerate(questions):
        aborts = {3: 10, 5: 14, 7: 22}.get(number)
        request = Request(context + question, 40, arrives=8, options=declared(CONTEXT))
        request.aborts = aborts
        requests.append(request)
    return requests, run_job(requests, kvzip=settings, max_num_batched_tokens=CHUNK)


def test_a_reused_context_gives_the_tokens_of_one_compressed_before_the_question(
    ten_questions, settings
):
    """The other way: one request, whose context fills whole chunks and is compressed after them."""
    requests, reused = ten_questions
    alone = [
        Request(request.prompt, request.max_tokens, 60 * number, options=declared(CONTEXT))
        for number, request in enumerate(requests[1:])
    ]
    report = run_job(
        alone,
        kvzip=settings,
        max_num_batched_tokens=CHUNK,
        enable_prefix_caching=False,
    )
    assert report.cached_tokens == [0] * len(alone)
    assert total(report, "requests_compressed_total") == len(alone)
    assert len({tuple(output) for output in report.outputs}) > 5  # the questions matter
    for request, output, expected in zip(
        requests[1:], reused.outputs[1:], report.outputs, strict=True
    ):
        assert output == expected[: len(output)]
        assert request.aborts or len(output) == request.max_tokens


def test_the_context_is_prefilled_once_and_held_once(ten_questions):
    _, report = ten_questions
    assert report.cached_tokens == [0] + [CONTEXT] * 10
    assert total(report, "prefix_hits_total") == 10
    assert total(report, "prefix_hit_tokens_total") == 10 * CONTEXT
    assert total(report, "requests_compressed_total") == 1
    assert max(report.prefix_entries) == report.prefix_entries[-1] == 1
    compressed = CONTEXT // BLOCK // 4
    step = 9  # all ten decode
    tails = [row - compressed for row in report.held_blocks[step].values()]
    assert len(tails) == 10
    assert all(tail <= ceil((101 + step) / BLOCK) for tail in tails)
    assert report.free_blocks[0] - report.free_blocks[step + 1] == compressed + sum(tails)


def test_everything_is_back_in_the_pool(ten_questions):
    _, report = ten_questions
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert total(report, "kv_bytes_saved") == 0


@pytest.mark.versions
def test_keep_ratio_one_equals_stock():
    context, questions = document(1000, seed=2)
    requests = [Request(context + questions[0], 12, options=declared(1000))]
    for number, question in enumerate(questions):
        options = declared(1000) if number % 2 else {}
        requests.append(Request(context + question, 40, arrives=10 + number // 4, options=options))
    stock = run_job(requests, enable_prefix_caching=False)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0})
    assert whole.outputs == stock.outputs
    assert whole.cached_tokens == [0] + [1000 // BLOCK * BLOCK] * 10
    assert total(whole, "prefix_hits_total") == 10


def test_a_conversation_starts_from_its_compressed_first_turn():
    """What was computed over the compressed prefix is cached as well, apart from raw blocks."""
    context, questions = document(1000, seed=3)
    turns = [context]
    for question in (questions[7], questions[6], questions[3]):
        turns.append(turns[-1] + question)
    requests = [Request(turn, 20, arrives=40 * number) for number, turn in enumerate(turns)]
    stock = run_job(requests, enable_prefix_caching=False)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0})
    assert whole.outputs == stock.outputs
    assert whole.cached_tokens == [0, 31 * BLOCK, 1100 // BLOCK * BLOCK, 1170 // BLOCK * BLOCK]
    assert total(whole, "prefix_hits_total") == 3
    assert total(whole, "requests_compressed_total") == 1
    third = run_job(requests, kvzip={"keep_ratio": 0.3})
    assert third.cached_tokens == whole.cached_tokens
    assert third.free_blocks[-1] == third.free_blocks[0]


def test_pool_pressure_evicts_prefixes_and_later_answers_are_right():
    context, questions = document(512, seed=4)
    others = [document(700, seed=seed)[0] for seed in range(10, 16)]
    requests = [Request(context + questions[2], 10, options=declared(512))]
    requests += [Request(other, 20, arrives=20 + 2 * i) for i, other in enumerate(others)]
    requests.append(Request(context + questions[4], 30, arrives=200, options=declared(512)))
    requests.append(Request(context + questions[5], 30, arrives=205, options=declared(512)))
    pool = {"num_gpu_blocks_override": 72, "max_model_len": 1024}
    stock = run_job(requests, enable_prefix_caching=False)
    whole = run_job(requests, kvzip={"keep_ratio": 1.0}, **pool)
    assert total(whole, "prefix_evictions_total/lru") >= 3
    assert whole.cached_tokens[-2:] == [0, 512]  # prefilled again, then reused again
    assert whole.outputs == stock.outputs
    assert whole.free_blocks[-1] == whole.free_blocks[0]


@pytest.mark.versions
def test_time_and_reset_end_a_prefix():
    context, questions = document(512, seed=5)
    requests = [
        Request(context + question, 8, arrives=20 * number, options=declared(512))
        for number, question in enumerate(questions[:6])
    ]
    settings = {"keep_ratio": 0.3, "reuse_ttl_seconds": 0.4}
    report = run_job(requests, kvzip=settings, actions={40: "sleep", 80: "reset"})
    assert total(report, "prefix_hits_total") == 3
    assert report.prefix_entries[39] == 1
    assert report.idle_prefixes == [[0, 0]]  # before anybody asked
    assert total(report, "prefix_evictions_total/ttl") == 1
    assert total(report, "prefix_evictions_total/reset") == 1
    assert total(report, "prefix_entries") == 1
    assert total(report, "requests_compressed_total") == 3
    assert report.cached_tokens == [0, 512, 512, 512, 0, 512]  # the third found the raw blocks


def test_raw_prefixes_win_when_asked_and_salts_separate():
    context, questions = document(512, seed=6)
    requests = [
        Request(context + question, 8, arrives=20 * number, options=declared(512))
        for number, question in enumerate(questions[:3])
    ]
    requests[2].cache_salt = "somebody else"
    raw = run_job(requests, kvzip={"keep_ratio": 0.3, "prefix_reuse": "raw"})
    assert total(raw, "prefix_hits_total") == 0
    assert raw.cached_tokens == [0, 512, 0]
    compressed = run_job(requests, kvzip={"keep_ratio": 0.3})
    assert total(compressed, "prefix_hits_total") == 1
    assert compressed.cached_tokens == [0, 512, 0]


def test_answers_are_found_in_a_context_that_was_compressed_before_the_question():
    context = make_context(np.random.default_rng(7), 1024, fact_density=0.3)
    keys = list(context.facts)[::8]
    requests = [Request(context.tokens.tolist(), 2, options=declared(1024))]
    expected = []
    for key in keys:
        prompt, value = question_prompt(context, key)
        requests.append(Request(prompt, 1, arrives=6, options=declared(1024)))
        expected.append(value)
    shares = {}
    for scorer in ("default", "random"):
        settings = {} if scorer == "default" else {"scorer": "random", "profile": "none"}
        report = run_job(requests, kvzip={"keep_ratio": 0.3, **settings})
        assert total(report, "prefix_hits_total") == len(keys)
        answers = [output[0] for output in report.outputs[1:]]
        shares[scorer] = np.mean([a == b for a, b in zip(answers, expected, strict=True)])
    assert shares["default"] >= 0.95
    assert shares["random"] < 0.6


def test_prefixes_scored_by_the_prompts_end_are_shared_only_when_declared():
    context, questions = document(512, seed=8)
    settings = {"keep_ratio": 0.3, "scorer": "window", "profile": "none"}
    for options, hits in (({}, 0), (declared(512), 1)):
        requests = [
            Request(context + question, 8, arrives=20 * number, options=options)
            for number, question in enumerate(questions[3:5])
        ]
        report = run_job(requests, kvzip=settings)
        assert total(report, "prefix_hits_total") == hits
        assert report.cached_tokens == [0, 512]
