"""Speculative decoding by a draft model, whose layers lie in the blocks of the compressed ones.

Drafts of the tiny model are EAGLE heads that are made of its layers, and the model itself. None
must change a token, whatever they guess: where everything is kept against stock vLLM, else against
the compressed engine that does not speculate.
"""

import functools
import itertools
import tempfile
from math import ceil
from pathlib import Path

import numpy as np
import pytest
from eagle_head import LAYERS as HEAD_LAYERS
from eagle_head import write_eagle_head
from engine_job import MODEL, Request, run_job

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


@functools.cache
def context(seed, length):
    return make_context(np.random.default_rng(seed), length, 0.6)


def requests():
    """Copies of several lengths that arrive while others run, then three of one declared context.

    The last one finds the tail of the one before it as well: the same prompt.
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
    return found


def run(keep_ratio=None, method=None, **engine):
    kvzip = None if keep_ratio is None else {"keep_ratio": keep_ratio}
    engine = {**CHUNKS, **engine}
    with tempfile.TemporaryDirectory() as folder:
        if method is not None:
            draft = MODEL if method == "draft_model" else write_eagle_head(Path(folder), method)
            engine["speculative_config"] = {
                "method": method, "model": str(draft), "num_speculative_tokens": GUESSES,
            }  # fmt: skip
        return run_job(requests(), kvzip=kvzip, **engine)


def accepted_share(report):
    """Guesses that were right / all guesses, in steps that decode."""
    right = asked = 0
    for before, after in itertools.pairwise(report.computed_tokens):
        for number, computed in after.items():
            if before.get(number, 0) > len(requests()[int(number)].prompt):
                right += computed - before[number] - 1
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
    return run(0.3, "eagle", watch_hashed_blocks=True)


@pytest.fixture(scope="module")
def by_model():
    return run(0.3, "draft_model", watch_hashed_blocks=True)


def test_where_everything_is_kept_tokens_are_those_of_stock_vllm(stock, whole_by_eagle):
    assert whole_by_eagle.outputs == stock.outputs
    assert whole_by_eagle.metrics["vllm_kvzip_requests_compressed_total"] == HIT
    assert len({tuple(output) for output in stock.outputs}) == len(requests()) - 1


@pytest.mark.versions
@pytest.mark.parametrize("method", ["eagle", "draft_model"])
def test_guesses_change_no_token_of_a_compressed_request(request, compressed, method):
    report = request.getfixturevalue({"eagle": "by_eagle", "draft_model": "by_model"}[method])
    assert report.outputs == compressed.outputs
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.written_hashed_blocks == []
    assert min(report.compared_hashed_blocks.values()) > 100
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == HIT
    assert report.metrics["vllm_kvzip_requests_skipped_total/failed"] == 0
    drafts = {"eagle": HEAD_LAYERS, "draft_model": LAYERS}[method]
    blocks = [len(each.prompt) // BLOCK for each in requests()[: HIT - 1]] + [CONTEXT // BLOCK]
    freed = sum(n - held(n, 0.3, drafts) for n in blocks)
    assert report.metrics["vllm_kvzip_blocks_freed_total"] == freed


def test_guesses_are_as_good_as_without_compression(whole_by_eagle, by_eagle, by_model):
    assert accepted_share(by_model) > 0.95
    assert accepted_share(whole_by_eagle) > 0.9
    assert accepted_share(by_eagle) > 0.95 * accepted_share(whole_by_eagle)


def test_compressed_prefixes_are_found_whole_and_their_tails_but_for_a_block(
    compressed, by_eagle, by_model
):
    """What an EAGLE head computed for a block's last token depends on the token after it."""
    for report, tail in ((compressed, 2), (by_model, 2), (by_eagle, 1)):
        assert report.metrics["vllm_kvzip_prefix_hits_total"] == 3
        assert report.cached_tokens[HIT:] == [CONTEXT, CONTEXT, CONTEXT + tail * BLOCK]


def test_preempted_requests_go_on_as_if_nothing_had_been(compressed):
    report = run(0.3, "eagle", **TIGHT)
    assert report.preemptions_seen
    assert report.outputs == compressed.outputs
    assert report.free_blocks[-1] == report.free_blocks[0]


def test_asynchronous_scheduling_changes_no_token(compressed):
    report = run(0.3, "eagle3", asynchronous=True, watch_hashed_blocks=True)
    assert report.batches_in_flight == 2
    assert len(report.free_blocks) < 0.9 * len(compressed.free_blocks)  # it did speculate
    assert report.outputs == compressed.outputs
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.written_hashed_blocks == []
