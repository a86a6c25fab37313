"""Blocks in host memory beside compressed ones: what is stored, what comes back, and its tokens.

The connector is vLLM's own; only its copies run in plain memory (`plain_offload`), as late as they
may. The load has chunked prompts, declared contexts that are reused, prompts that are left alone,
preemption and aborts. Then vLLM's cache is emptied, and all prompts come again.
"""

import numpy as np
import pytest
from engine_job import Request, run_job
from plain_offload import connector

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

BLOCK, AGAIN = 32, 300
ENGINE = {
    "max_model_len": 512,
    "max_num_batched_tokens": 128,
    "environment": {"PYTHONHASHSEED": "0"},  # equal tokens have equal hashes in all engines
}
ABORTED = {3: 15, 9: 41}
LEFT_ALONE = (4, 7)
COMPRESSED_LENGTHS = (300, 417, 256, 333, 290, 352, 321)


def tokens(rng, length):
    return make_context(rng, max(length, 3)).tokens.tolist()[:length]


def load():
    """Requests as they come first; the same requests come again later, in another order."""
    rng = np.random.default_rng(3)
    first = [
        Request(tokens(rng, length), int(rng.integers(20, 70)), arrives=number)
        for number, length in enumerate(COMPRESSED_LENGTHS)
    ]
    context = tokens(rng, 288)
    for number, length in enumerate((40, 1, 70, 33), start=len(first)):
        options = {"extra_args": {"kvzip_context_tokens": len(context)}}
        asking = Request(context + tokens(rng, length), 24, number, options=options)
        first.append(asking)
    for number in LEFT_ALONE:
        first[number].options = {"extra_args": {"kvzip": "off"}}
    again = [
        Request(one.prompt, one.max_tokens, AGAIN + place, options=one.options)
        for place, one in enumerate(reversed(first))
    ]
    for number, step in ABORTED.items():
        first[number].aborts = step
    return first + again


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("offloaded")


def run(folder, name, keep_ratio, num_blocks, **arguments):
    """Report of an engine, and what it keeps in host memory by hash."""
    file = folder / f"{name}.npz"
    report = run_job(
        load(),
        kvzip={"keep_ratio": keep_ratio},
        actions={AGAIN - 1: "reset"},
        kv_transfer_config=connector(),
        offloaded_to=file,
        num_gpu_blocks_override=num_blocks,
        **ENGINE,
        **arguments,
    )
    return report, dict(np.load(file))


@pytest.fixture(scope="module")
def compressed(folder):
    return run(folder, "compressed", 0.3, 24, asynchronous=True)


@pytest.fixture(scope="module")
def unchanged(folder):
    """At keep ratio 1.0."""
    return run(folder, "unchanged", 1.0, 35)


@pytest.fixture(scope="module")
def stock(folder, compressed, unchanged):
    """Without compression: first the load's prompts, then all that either engine has read."""
    prompts = [Request(one.prompt, one.max_tokens, 4 * n) for n, one in enumerate(load())]
    for report, _ in (compressed, unchanged):
        for number, one in enumerate(load()):
            read = one.prompt + report.outputs[number]
            prompts.append(Request(read, 1, arrives=120 + 2 * len(prompts)))
    file = folder / "stock.npz"
    report = run_job(
        prompts,
        kv_transfer_config=connector(256),
        offloaded_to=file,
        max_num_batched_tokens=2048,
        environment=ENGINE["environment"],
    )
    return report, dict(np.load(file))


@pytest.mark.parametrize("engine", ["compressed", "unchanged"])
def test_every_stored_block_is_what_its_hash_says(engine, stock, request):
    report, stored = request.getfixturevalue(engine)
    _, expected = stock
    num_loaded = stored.pop("num_loaded")
    assert num_loaded > 60
    assert report.num_preemptions > 0
    assert len(stored) > 75
    wrong = [
        key for key, found in stored.items() if not np.allclose(found, expected[key], atol=1e-4)
    ]
    assert wrong == []


def test_what_was_computed_over_a_compressed_prefix_is_not_stored(compressed):
    """Whole blocks of the prompts, and of answers of requests that are left alone; no others."""
    report, stored = compressed
    prompts = {
        tuple(one.prompt[: n * BLOCK])
        for one in load()
        for n in range(1, 15)
        if n * BLOCK <= len(one.prompt)
    }
    answers = set()
    for number, one in enumerate(load()):
        if "kvzip" in one.options.get("extra_args", {}):
            whole = one.prompt + report.outputs[number]
            answers |= {tuple(whole[: n * BLOCK]) for n in range(1, 17) if n * BLOCK <= len(whole)}
    assert len(stored) - 1 <= len(prompts | answers)
    assert report.metrics["vllm_kvzip_prefix_hits_total"] > 0


def test_prompts_that_are_loaded_are_compressed_like_others(compressed):
    report, _ = compressed
    num_first = len(load()) // 2
    assert report.metrics["vllm_kvzip_requests_compressed_total"] >= 2 * (num_first - 6)
    for number, one in enumerate(load()[num_first:]):
        earlier = num_first - 1 - number
        if "kvzip_context_tokens" in one.options.get("extra_args", {}):
            continue  # they may find their context compressed, or read it anew
        found, before = report.outputs[num_first + number], report.outputs[earlier]
        assert found[: len(before)] == before, earlier
        assert len(report.outputs[num_first + number]) == one.max_tokens


def test_at_keep_ratio_one_tokens_are_those_of_stock_vllm(unchanged, stock):
    report, _ = unchanged
    for found, expected in zip(report.outputs, stock[0].outputs, strict=False):
        assert found == expected[: len(found)]


@pytest.mark.parametrize("engine", ["compressed", "unchanged"])
def test_all_blocks_come_back(engine, request):
    report, _ = request.getfixturevalue(engine)
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.free_blocks[AGAIN - 2] == report.free_blocks[0]


def test_the_example_connector_stores_and_loads_whole_prompts(stock, tmp_path):
    """The last request starts from the context that the second one has compressed."""
    numbers = (0, 9, 10)
    wanted = [load()[number] for number in numbers]
    for place, one in enumerate(wanted):
        one.arrives, one.aborts = 30 * place, None
    again = [
        Request(one.prompt, one.max_tokens, one.arrives + 160, options=one.options)
        for one in wanted
    ]
    report = run_job(
        wanted + again,
        kvzip={"keep_ratio": 1.0},
        actions={159: "reset"},
        environment=ENGINE["environment"],
        max_num_batched_tokens=2048,
        enable_chunked_prefill=False,
        kv_transfer_config={
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
        },
    )
    assert report.outputs == [stock[0].outputs[number] for number in numbers] * 2
    assert report.metrics["vllm_kvzip_prefix_hits_total"] == 2
    assert len(list(tmp_path.iterdir())) == 2
    assert report.cached_tokens == [0, 0, 288, 288, 352, 288]
    assert report.free_blocks[-1] == report.free_blocks[0]
