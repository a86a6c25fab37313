"""Requests that end or lose their blocks, at any stage, leave the pool and all others untouched.

One history for all runs: eleven requests that are aborted, each at another stage of its way and
followed by one with the same prompt; then loads that the pool is too small for, so that requests
are preempted at different stages. Prefix caching and chunked prefill are on.
"""

import itertools

import numpy as np
import pytest
from engine_job import Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, CHUNK, PROMPT = 32, 256, 700
PREFIX = PROMPT // BLOCK * BLOCK
SLOT = 50  # steps from one aborted request to the next
SEATS = 10

# A prompt of 700 tokens takes three steps; it is compressed at the start of the fourth.
STAGES = {
    "before its first step": {"aborts": 0},
    "while it waits for a seat": {"aborts": 3},
    "in the middle of its prefill": {"aborts": 1},
    "while a chunk is computed": {"aborts_during": 1},
    "while its last chunk is computed": {"aborts_during": 2},
    "before it is compressed": {"aborts": 3},
    "while it is compressed": {"aborts_during": 3},
    "right after it was compressed": {"aborts": 4},
    "while it decodes": {"aborts": 12},
    "while a token is computed": {"aborts_during": 13},
    "two samples while they decode": {"aborts": 12},
}
# What the next request with the same prompt finds. A prefix that was completed is compressed and
# kept, whatever became of its request.
COMPLETED = list(STAGES)[4:]
FOUND = {
    "before its first step": 0,
    "while it waits for a seat": 0,
    "in the middle of its prefill": CHUNK,
    "while a chunk is computed": 2 * CHUNK,
    **dict.fromkeys(COMPLETED, PREFIX),
}
LOAD_STARTS = SLOT * len(STAGES)
SCRIBBLE = LOAD_STARTS + 700
ENGINE = {
    "max_num_batched_tokens": CHUNK,
    "max_num_seqs": SEATS,
    "num_gpu_blocks_override": 60,
    "max_model_len": 896,
}


def prompt(seed, length=PROMPT):
    return make_context(np.random.default_rng(seed), length).tokens.tolist()


def history(keep_ratio):
    """Requests, and the numbers of those that follow an aborted one."""
    requests, followers = [], []
    for index, (stage, aborts) in enumerate(STAGES.items()):
        start = SLOT * index
        victim = Request(prompt(index), 40, arrives=start)
        for name, step in aborts.items():
            setattr(victim, name, start + step)
        if stage == "while it waits for a seat":
            seated = [Request(prompt(100 + seat, 60), 10, arrives=start) for seat in range(SEATS)]
            requests += seated
        if stage == "two samples while they decode":
            victim.options = {"n": 2, "temperature": 1.0, "top_k": 1}
        requests.append(victim)
        followers.append(len(requests))
        requests.append(Request(prompt(index), 20, arrives=start + 22))
    requests += preempted_in_prefill(LOAD_STARTS, 500 if keep_ratio == 1.0 else 700)
    system = prompt(200, 96)
    for index in range(10):
        user = prompt(300 + index, 110 + 9 * index)
        requests.append(Request(system + user, 150, arrives=LOAD_STARTS + 300 + 2 * index))
    requests.append(Request(prompt(400, 10), 10, arrives=SCRIBBLE - 3))
    return requests, followers


def preempted_in_prefill(start, length):
    """Nine that decode in step, and one that prefills when all of them need their next block.

    It does not find enough blocks then, once in the middle of its prompt. When it arrives one step
    earlier it completes its prompt, and asynchronous scheduling preempts it right after that.
    """
    requests = []
    for arrives in (54, 55):
        seeds = range(start, start + 9)
        requests += [Request(prompt(seed, 40), 75, arrives=start) for seed in seeds]
        requests.append(Request(prompt(start, length), 20, arrives=start + arrives))
        start += 150
    return requests


@pytest.fixture(scope="module")
def stock():
    """The same requests where nobody has to give way and nothing is cached."""
    return run_job(history(1.0)[0], enable_prefix_caching=False)


@pytest.fixture(
    scope="module",
    params=[
        ({"keep_ratio": 1.0}, False),
        pytest.param(({"keep_ratio": 1.0}, True), marks=pytest.mark.versions),
        ({"keep_ratio": 0.3}, True),
        ({"mode": "mixed", "keep_bytes_ratio": 0.3}, True),
    ],
    ids=["keep 1.0", "keep 1.0, asynchronous", "keep 0.3, asynchronous", "mixed, asynchronous"],
)
def run(request):
    """The history with compression, in a pool that is too small for the loads at its end."""
    settings, asynchronous = request.param
    keep_ratio = next(value for name, value in settings.items() if name != "mode")
    report = run_job(
        history(keep_ratio)[0],
        kvzip={**settings, "min_prompt_tokens": 64},
        watch_hashed_blocks=True,
        asynchronous=asynchronous,
        actions={SCRIBBLE: "scribble"},
        **ENGINE,
    )
    assert report.batches_in_flight == (2 if asynchronous else 1)
    return keep_ratio, report


def stages_of_preemption(requests, report):
    """At which stages requests lost their blocks."""
    found = set()
    for before, after in itertools.pairwise(report.computed_tokens):
        for number, computed in before.items():
            if after.get(number, computed) < computed:
                rest = len(requests[int(number)].prompt) - computed
                found.add("prefill" if rest > 0 else "decode" if rest < 0 else "completed")
    return found


def test_the_pool_is_whole_after_every_abort(run):
    _, report = run
    for index in range(1, len(STAGES) + 1):
        assert report.free_blocks[SLOT * index] == report.free_blocks[0], list(STAGES)[index - 1]
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.metrics["vllm_kvzip_kv_bytes_saved"] == 0


def test_aborted_requests_leave_what_they_completed(run):
    keep_ratio, report = run
    _, followers = history(keep_ratio)
    found = [report.cached_tokens[number] for number in followers]
    assert dict(zip(STAGES, found, strict=True)) == FOUND
    assert report.metrics["vllm_kvzip_requests_skipped_total/ended_before_decode"] >= 2


def test_nobody_else_notices_an_abort_or_a_preemption(run, stock):
    keep_ratio, report = run
    requests, _ = history(keep_ratio)
    late = {"completed"} if report.batches_in_flight > 1 else set()
    assert stages_of_preemption(requests, report) == {"prefill", "decode"} | late
    assert len(report.preemptions_seen) >= 3
    for number, request in enumerate(requests):
        if request.aborts is request.aborts_during is None:
            assert len(report.outputs[number]) == request.max_tokens
            if keep_ratio == 1.0:
                assert report.outputs[number] == stock.outputs[number], number


def test_cached_blocks_are_never_written_to(run):
    _, report = run
    assert len(report.scribbled_blocks) == 1  # the watch sees the one write that breaks the rule
    assert report.written_hashed_blocks == report.scribbled_blocks
    assert min(report.compared_hashed_blocks.values()) > 1000
