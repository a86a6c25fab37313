"""A model of another architecture and shape goes the same way: Qwen2, groups of 3, head size 64."""

import numpy as np
import pytest
from engine_job import MODEL, Request, run_job

from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, copy_prompt, make_context
from vllm_kvzip.evaluation.tasks.word_tasks import TASKS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

TRACKER = MODEL.with_name("tiny-tracker")


def test_keep_one_equals_stock():
    rng = np.random.default_rng(8)
    contexts = [make_context(rng, n) for n in (33, 64, 200, 256, 500, 777)]
    requests = [
        Request(copy_prompt(context, 5)[0], 24, arrives=number)
        for number, context in enumerate(contexts)
    ]
    stock = run_job(requests, model=TRACKER)
    ours = run_job(requests, model=TRACKER, kvzip={"keep_ratio": 1.0, "min_prompt_tokens": 0})
    assert ours.outputs == stock.outputs
    assert ours.metrics["vllm_kvzip_requests_compressed_total"] == len(requests)
    assert ours.free_blocks[-1] == ours.free_blocks[0]


@pytest.fixture(scope="module")
def answered():
    """Share of right answer tokens over contexts that were compressed before, by settings."""
    rng = np.random.default_rng(9)
    tasks = ("multi-key", "chain", "most")
    documents = [TASKS[task](rng, 768, 12) for task in tasks for _ in range(3)]
    declared = {"extra_args": {"kvzip_context_tokens": 768}}
    requests = [Request(document.tokens, 2, options=declared) for document in documents]
    answers = []
    for document in documents:
        for question in document.questions:
            prompt = [*document.tokens, *question.tokens]
            requests.append(Request(prompt, len(question.answer), arrives=40, options=declared))
            answers.append(question.answer)
    settings = {
        "full": None,
        "default": {"keep_ratio": 0.5},
        "kvzip": {"keep_ratio": 0.3, "scorer": "kvzip"},
        "surrogate": {"keep_ratio": 0.3, "scorer": "surrogate"},
        "random": {"keep_ratio": 0.3, "scorer": "random", "profile": "none"},
    }
    shares = {}
    for name, kvzip in settings.items():
        report = run_job(requests, model=TRACKER, kvzip=kvzip)
        outputs = report.outputs[len(documents) :]
        shares[name] = np.mean(np.concatenate(outputs) == np.concatenate(answers))
        if kvzip is not None:
            assert report.metrics["vllm_kvzip_prefix_hits_total"] == len(outputs)
    return shares


def test_the_model_answers_without_compression(answered):
    assert answered["full"] > 0.95


@pytest.mark.parametrize(("name", "least"), [("kvzip", 0.98), ("surrogate", 0.9), ("default", 0.9)])
def test_answers_survive_compression(answered, name, least):
    assert answered[name] >= least * answered["full"]


def test_random_eviction_destroys_them(answered):
    assert answered["random"] < 0.7 * answered["kvzip"]


def test_it_is_served():
    document = TASKS["chain"](np.random.default_rng(5), 768, 4)
    flags = ["--kv-compression", "kvzip", "--kv-compression-config.scorer", "kvzip"]
    flags += ["--kv-compression-config.keep_ratio", "0.3"]
    with LocalServer(str(TRACKER), *flags) as server:
        for question in document.questions:
            prompt = VOCABULARY.text([*document.tokens, *question.tokens])
            options = {"vllm_xargs": {"kvzip_context_tokens": 768}}
            answer = "".join(server.stream(prompt, len(question.answer), **options))
            assert answer.split() == VOCABULARY.text(question.answer).split()
        assert server.metrics()["vllm_kvzip_prefix_hits_total"] == 3
