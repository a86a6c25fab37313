"""A prompt that cannot be compressed goes on uncompressed, and nobody else notices.

One history: for every fault a request that meets it, beside a neighbour; requests that start from
what was to be its prefix, in the step in which it fails and later; and the same prompts once more,
never to be compressed, which is what all of them must answer. Everything is kept, so that
compressed neighbours must as well.
"""

from collections import Counter

import numpy as np
import pytest
from engine_job import TWO_STAGES, Request, run_job
from faults import FAULTS

from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SLOT = 40  # steps from one fault to the next
LENGTH, OUTPUT = 300, 24
OFF = {"extra_args": {"kvzip": "off"}}


def prompt(seed, asked=20):
    """Ends in words whose continuation the model knows, so that no token is a near tie."""
    context = make_context(np.random.default_rng(seed), LENGTH)
    return list(copy_prompt(context, asked)[0])


def history():
    requests = []
    for number, fault in enumerate(FAULTS):
        start = SLOT * number
        requests += [
            Request(prompt(number), OUTPUT, arrives=start, fault=fault),
            Request(prompt(100 + number), OUTPUT, arrives=start),
            Request(prompt(number, 60), OUTPUT, arrives=start + 1),  # while it fails
            Request(prompt(number, 90), OUTPUT, arrives=start + 2, fault=fault),
        ]
    start = SLOT * len(FAULTS)
    for value in ("nan", "inf"):
        requests.append(Request(prompt(0), OUTPUT, arrives=start, embeds=value))
        requests.append(Request(prompt(300), OUTPUT, arrives=start + 1))
    asked = len(requests)
    for request in requests[:asked]:
        # Broken prompts last: nobody cleans up behind those that are off.
        start = SLOT * (len(FAULTS) + (3 if request.embeds else 1))
        requests.append(
            Request(request.prompt, OUTPUT, arrives=start, options=OFF, embeds=request.embeds)
        )
    return requests, asked


TWO_RANKS = {  # of which the last one fails
    "asynchronous": True, "tensor_parallel_size": 2, "distributed_executor_backend": "mp",
}  # fmt: skip


# Of two pipeline stages the first one fails; several steps are on their way then.
ENGINES = {"one rank": {}, "two, asynchronous": TWO_RANKS, "two stages": TWO_STAGES}


@pytest.fixture(scope="module", params=ENGINES.values(), ids=ENGINES.keys())
def job(request):
    requests, asked = history()
    report = run_job(
        requests,
        kvzip={"keep_ratio": 1.0, "scorer": "contrast"},
        enable_prefix_caching=True,
        enable_prompt_embeds=True,
        max_num_seqs=8,
        max_model_len=512,
        **request.param,
    )
    return report, requests, asked


def test_everybody_answers_what_stock_vllm_answers(job):
    report, requests, asked = job
    wrong = [
        (number, requests[number].fault)
        for number in range(asked)
        if report.outputs[number] != report.outputs[asked + number]
    ]
    assert wrong == []
    assert {len(output) for output in report.outputs} == {OUTPUT}


def test_every_block_is_back_in_the_pool_and_nothing_half_done_is_published(job):
    report, _, _ = job
    assert report.free_blocks[-1] == report.free_blocks[0]
    metrics = report.metrics
    assert metrics["vllm_kvzip_kv_bytes_saved"] == 0
    assert metrics["vllm_kvzip_prefix_evictions_total/failed"] >= len(FAULTS)


def test_failures_are_counted_by_reason(job):
    report, _, _ = job
    kinds = Counter(FAULTS.values())  # each met by one request and two that share its prefix
    skipped = {r: report.metrics[f"vllm_kvzip_requests_skipped_total/{r}"] for r in kinds}
    assert skipped == {
        "failed": 3 * kinds["failed"],
        "not_finite": 3 * kinds["not_finite"] + 2,  # and by two prompts of embeddings
    }
    compressed = len(FAULTS) + 2
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == compressed
    assert report.metrics["vllm_kvzip_keep_ratio_count"] == compressed
