"""What trained models with layers of several kinds still answer over compressed contexts."""

import numpy as np
import pytest
from engine_job import MODEL, Request, run_job
from random_model import KINDS

from vllm_kvzip.evaluation.tasks.word_tasks import TASKS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONTEXT = 768
RANDOM = {"scorer": "random", "profile": "none"}
MODELS = {  # what its engine needs, and how scorer surrogate shares the pages
    "tiny-windowed": ({}, "profile"),
    "tiny-convolved": (KINDS["lfm2"].engine, "adaptive"),
}
REPEATING = "tiny-windowed"  # scorer kvzip is refused beside states


@pytest.fixture(scope="module", params=list(MODELS))
def answered(request):
    """Share of right answers over contexts that were compressed before, by settings."""
    engine, budget = MODELS[request.param]
    settings = {
        "full": None,
        "default at 0.5": {"keep_ratio": 0.5},  # its profile is found
        "surrogate at 0.3": {"keep_ratio": 0.3, "scorer": "surrogate", "budget": budget},
        "random at 0.3": {"keep_ratio": 0.3, **RANDOM},
    }
    if request.param == REPEATING:
        settings["kvzip at 0.3"] = {"keep_ratio": 0.3, "scorer": "kvzip"}
    rng = np.random.default_rng(9)
    documents = [TASKS["multi-key"](rng, CONTEXT, 8) for _ in range(6)]
    declared = {"extra_args": {"kvzip_context_tokens": CONTEXT}}
    requests = [Request(document.tokens, 2, options=declared) for document in documents]
    questions = [(document, question) for document in documents for question in document.questions]
    requests += [
        Request([*document.tokens, *question.tokens], 1, arrives=40, options=declared)
        for document, question in questions
    ]
    wanted = [question.answer[0] for _, question in questions]
    shares = {}
    for name, kvzip in settings.items():
        report = run_job(requests, model=MODEL.with_name(request.param), kvzip=kvzip, **engine)
        outputs = [output[0] for output in report.outputs[len(documents) :]]
        shares[name] = np.mean(np.array(outputs) == np.array(wanted))
        if kvzip is not None:
            assert report.metrics["vllm_kvzip_prefix_hits_total"] == len(questions)
            assert report.free_blocks[-1] == report.free_blocks[0]
    return shares


def test_the_model_answers_without_compression(answered):
    assert answered["full"] > 0.97


def test_answers_survive_compression(answered):
    assert answered["default at 0.5"] >= 0.95 * answered["full"]
    assert answered["surrogate at 0.3"] >= 0.75 * answered["full"]


def test_random_eviction_loses_more(answered):
    assert answered["random at 0.3"] < 0.85 * answered["surrogate at 0.3"]


@pytest.mark.parametrize("answered", [REPEATING], indirect=True)
def test_answers_survive_when_the_model_has_repeated_the_context(answered):
    assert answered["kvzip at 0.3"] >= 0.95 * answered["full"]
    assert answered["random at 0.3"] < 0.8 * answered["kvzip at 0.3"]
