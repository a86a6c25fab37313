"""A constant part of the keys costs quantized pages nothing, on real vLLM."""

import numpy as np
import pytest
from biased_model import make_pair
from engine_job import Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context, question_prompt

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

CONTEXT = 992


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def asked():
    """Questions about one context, which is compressed before they come; and their answers."""
    context = make_context(np.random.default_rng(4), CONTEXT, 0.4)
    keys = list(context.facts)[::3][:24]
    questions = [question_prompt(context, key) for key in keys]
    options = {"extra_args": {"kvzip_context_tokens": CONTEXT}}
    requests = [Request(context.tokens.tolist(), 2, options=options)]
    requests += [Request(prompt, 1, 40, options=options) for prompt, _ in questions]
    return requests, [value for _, value in questions]


@pytest.fixture(scope="module")
def stock(models, asked):
    """What the model without a bias answers uncompressed."""
    return answers(models[0], asked[0], None)


def answers(model, requests, kvzip):
    report = run_job(requests, kvzip=kvzip, model=model)
    if kvzip is not None:
        assert report.metrics["vllm_kvzip_prefix_hits_total"] == len(requests) - 1
    return [output[0] for output in report.outputs[1:]]


def test_the_model_answers(stock, asked):
    assert np.mean([a == b for a, b in zip(stock, asked[1], strict=True)]) > 0.9


@pytest.mark.parametrize("name", ["nf4", "int4", "int8"])
def test_biased_keys_are_answered_alike_in_every_format(models, asked, stock, name):
    settings = {"mode": "quantize", "scorer": "knorm", "profile": "none"}
    settings |= {"key_format": name, "value_format": name}
    found = answers(models[1], asked[0], settings)
    assert np.mean([a == b for a, b in zip(found, stock, strict=True)]) > 0.9
