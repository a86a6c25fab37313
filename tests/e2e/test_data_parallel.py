"""Several engines behind one server: a context is there wherever its questions go."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from engine_job import MODEL

from vllm_kvzip.evaluation.local_server import LocalServer
from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PATH = "/v1/kvzip/contexts"
QUESTIONS = 6


@pytest.fixture(scope="module")
def server():
    flags = ("--kv-compression", "kvzip", "--data-parallel-size", "2")
    with LocalServer(str(MODEL), *flags, environment={"VLLM_PLUGINS": "kvzip"}) as running:
        yield running


def hits(server):
    name = "vllm_kvzip_prefix_hits_total"
    return sum(value for key, value in server.metrics().items() if key.startswith(name))


def test_a_context_is_compressed_and_listed_on_every_engine(server):
    context = make_context(np.random.default_rng(1), 600).tokens.tolist()
    answer = json.loads(server.post(PATH, prompt=context))
    listed = json.loads(server.get(PATH))
    entries = [(entry["id"], entry["data_parallel_rank"]) for entry in listed["contexts"]]
    assert entries == [(answer["id"], 0), (answer["id"], 1)]
    assert listed["blocks_held"] == 2 * answer["blocks_held"]
    before = hits(server)
    with ThreadPoolExecutor(QUESTIONS) as pool:  # at once: vLLM shares them among its engines
        asked = [
            pool.submit(
                server.complete, [*context, 7 + number], 8, vllm_xargs=answer["send"]["vllm_xargs"]
            )
            for number in range(QUESTIONS)
        ]
        assert all(one.result()["usage"]["completion_tokens"] == 8 for one in asked)
    assert hits(server) - before == QUESTIONS
