"""Speculative decoding by a draft model, whose layers lie in the blocks of the compressed ones.

Drafts of the tiny model are an EAGLE head that was trained for it, so that some of its guesses are
right and others wrong; one that is made of the model's layers; an MTP layer; and the model itself.
None must change a token: where everything is kept against stock vLLM, else against the compressed
engine that does not speculate.
"""

import functools
import itertools
import tempfile
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from eagle_head import write_eagle_head
from engine_job import MODEL, RUNNER_V2, Request, run_job
from mtp_model import HEAD, write_mtp_model

from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, GUESSES, CONTEXT = 32, 3, 416
LAYERS = 4
CHUNKS = {
    "max_num_batched_tokens": 192,
    "long_prefill_token_threshold": 96,
    "num_gpu_blocks_override": 1024,
}
TIGHT = {**CHUNKS, "num_gpu_blocks_override": 43, "max_model_len": 800}
HIT = 4  # the first request that finds a compressed prefix
LONG = 7  # fills the model's positions
EVERY, SHORT, SHARING = range(LONG + 1), range(LONG), range(HIT - 1, LONG)
WATCHED = {"watch_hashed_blocks": True}


@functools.cache
def context(seed, length):
    return make_context(np.random.default_rng(seed), length, 0.6)


def requests():
    """Copies of several lengths that arrive while others run, then three of one declared context.

    The last of these finds the tail of the one before it as well: the same prompt. At last one that
    is as long as the model's positions allow.
    """
    found = []
    for index, length in enumerate((500, 320, 700, CONTEXT)):
        prompt, _ = copy_prompt(context(200 + index, length), 40)
        declared = {"extra_args": {"kvzip_context_tokens": CONTEXT}} if index == HIT - 1 else {}
        found.append(Request(prompt, 48, arrives=2 * index, options=declared))
    for offset in (90, 200, 200):
        prompt, _ = copy_prompt(context(200 + HIT - 1, CONTEXT), offset, num_hint_tokens=70)
        declared = {"extra_args": {"kvzip_context_tokens": CONTEXT}}
        found.append(Request(prompt, 40, options=declared, arrives=30 + 30 * (len(found) - HIT)))
    prompt, _ = copy_prompt(context(300, 1960), 500)
    return [*found, Request(prompt, 80, arrives=6)]


def run(keep_ratio=None, method=None, among=EVERY, **engine):
    kvzip = None if keep_ratio is None else {"keep_ratio": keep_ratio}
    engine = {**CHUNKS, **engine}
    with tempfile.TemporaryDirectory() as folder:
        drafts = {
            "eagle": lambda: HEAD,
            "eagle3": lambda: write_eagle_head(Path(folder), "eagle3"),
            "draft_model": lambda: MODEL,
            "mtp": lambda: write_mtp_model(Path(folder) / "tiny-mimo"),
        }
        if method is not None:
            draft = drafts[method]()
            engine["speculative_config"] = {
                "method": method, "model": str(draft), "num_speculative_tokens": GUESSES,
            }  # fmt: skip
        if method == "mtp":  # MTP layers are a part of the model
            engine |= {"model": draft, "skip_tokenizer_init": True}
            kvzip |= {"profile": str(draft.with_suffix(".json"))}
        return run_job([requests()[number] for number in among], kvzip=kvzip, **engine)


def accepted_share(report, among=EVERY):
    """Guesses that were right / all guesses, in steps that decode, of some requests."""
    right = asked = 0
    for before, after in itertools.pairwise(report.output_tokens):
        for number, generated in after.items():
            if int(number) not in among:
                continue
            if (told := generated - before.get(number, 0)) and before.get(number):
                right += told - 1
                asked += GUESSES
    return right / asked


def held(num_blocks, keep_ratio, drafts):
    """Blocks of a compressed prefix whose draft's layers keep everything."""
    kept = ceil(keep_ratio * num_blocks)
    return kept + ceil(drafts * (num_blocks - kept) / (LAYERS + drafts))


@pytest.fixture(scope="module")
def stock():
    return run()


@pytest.fixture(scope="module")
def compressed():
    return run(0.3)


@pytest.fixture(scope="module")
def whole_by_eagle():
    return run(1.0, "eagle")


@pytest.fixture(scope="module")
def by_eagle():
    return run(0.3, "eagle", **WATCHED)


@pytest.fixture(scope="module")
def by_model():
    return run(0.3, "draft_model", **WATCHED)


@pytest.fixture(scope="module")
def by_mtp():
    return run(0.3, "mtp", **WATCHED)


@pytest.fixture(scope="module")
def by_eagle_on_v2():
    return run(0.3, "eagle", SHORT, environment=RUNNER_V2, asynchronous=True, **WATCHED)


@pytest.fixture(scope="module")
def by_model_on_v2():
    return run(0.3, "draft_model", SHARING, environment=RUNNER_V2, **WATCHED)


def test_where_everything_is_kept_tokens_are_those_of_stock_vllm(stock, whole_by_eagle):
    assert whole_by_eagle.outputs == stock.outputs
    assert whole_by_eagle.metrics["vllm_kvzip_requests_compressed_total"] == HIT + 1
    assert len({tuple(output) for output in stock.outputs}) == len(requests()) - 1


RUNS = {
    "by_eagle": (1, EVERY),
    "by_model": (LAYERS, EVERY),
    "by_mtp": (1, EVERY),
    "by_eagle_on_v2": (1, SHORT),
    "by_model_on_v2": (LAYERS, SHARING),
}
"""Layers of the draft, and which requests were asked: the interpreter is slow."""
ON_EVERY_VLLM = ("by_eagle", "by_model", "by_eagle_on_v2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.versions] if name in ON_EVERY_VLLM else [])
        for name in RUNS
    ],
)
def test_guesses_change_no_token_of_a_compressed_request(request, compressed, name):
    report, (drafts, among) = request.getfixturevalue(name), RUNS[name]
    assert report.classes["runner"].endswith("cpu.model_runner") == name.endswith("v2")
    assert accepted_share(report) > 0.05  # it did speculate
    assert report.outputs == [compressed.outputs[number] for number in among]
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.written_hashed_blocks == []
    assert min(report.compared_hashed_blocks.values()) > 100
    compressing = [number for number in among if number < HIT or number == LONG]
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == len(compressing)
    assert report.metrics["vllm_kvzip_requests_skipped_total/failed"] == 0
    lengths = {n: len(requests()[n].prompt) for n in compressing} | {HIT - 1: CONTEXT}
    blocks = [length // BLOCK for length in lengths.values()]
    freed = sum(n - held(n, 0.3, drafts) for n in blocks)
    assert report.metrics["vllm_kvzip_blocks_freed_total"] == freed


def test_guesses_are_as_good_as_without_compression(
    whole_by_eagle, by_eagle, by_model, by_eagle_on_v2, by_model_on_v2
):
    right = accepted_share(whole_by_eagle)
    assert 0.3 < right < 0.98
    assert accepted_share(by_eagle) == pytest.approx(right, rel=0.05)
    assert accepted_share(by_eagle_on_v2) == pytest.approx(
        accepted_share(by_eagle, SHORT), rel=0.05
    )
    for report in (by_model, by_model_on_v2):
        assert accepted_share(report) > 0.95


def test_compressed_prefixes_are_found_whole_and_their_tails_but_for_a_block(
    compressed, by_eagle, by_model, by_eagle_on_v2
):
    """What an EAGLE head computed for a block's last token depends on the token after it."""
    for report, tail in ((compressed, 2), (by_model, 2), (by_eagle, 1), (by_eagle_on_v2, 1)):
        assert report.metrics["vllm_kvzip_prefix_hits_total"] == 3
        assert report.cached_tokens[HIT:LONG] == [CONTEXT, CONTEXT, CONTEXT + tail * BLOCK]


def test_preempted_requests_go_on_as_if_nothing_had_been(compressed):
    """With an EAGLE-3 head, and a step scheduled before the one before it has ended."""
    report = run(0.3, "eagle3", SHORT, asynchronous=True, **TIGHT)
    assert report.preemptions_seen
    assert report.batches_in_flight == 2
    assert report.outputs == compressed.outputs[:LONG]
    assert report.free_blocks[-1] == report.free_blocks[0]
