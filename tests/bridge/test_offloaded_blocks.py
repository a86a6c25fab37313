"""What vLLM's OffloadingConnector stores and loads beside compression, in thousands of steps.

Its scheduler side is vLLM's own, in vLLM's own scheduler; blocks hold a label of what is in them.
"""

import random

import pytest
from own_scheduler import request
from symbolic_blocks import SymbolicEngine
from vllm import SamplingParams

from vllm_kvzip.vllm_bridge.connectors import raw_rows

pytestmark = pytest.mark.vllm


def random_load(engine, rng, num_requests, resets=True):
    """Prompts with common beginnings come, end and are aborted; returns the engine at rest.

    Now and then everybody is preempted, or host memory is emptied.
    """
    contexts = [[rng.randrange(50) for _ in range(rng.choice((64, 96, 128)))] for _ in range(3)]
    waiting = []
    for number in range(num_requests):
        asked = request(f"{number}", 1)
        prompt = [*rng.choice(contexts), *(rng.randrange(50) for _ in range(rng.randrange(1, 90)))]
        extra = {}
        if rng.random() < 0.4:
            extra = {"kvzip_context_tokens": len(prompt) // 32 * 32}
        elif rng.random() < 0.2:
            extra = {"kvzip": "off"}
        if waiting and rng.random() < 0.4:
            prompt = list(rng.choice(waiting)[0])
        waiting.append((prompt, extra))
        params = SamplingParams(max_tokens=rng.randrange(1, 40), ignore_eos=True, extra_args=extra)
        asked.__init__(f"{number}", prompt, params, None, block_hasher=asked._block_hasher)
        engine.add(asked)
        steps = rng.randrange(4)
        for _ in range(steps):
            engine.step()
            if rng.random() < 0.05 and engine.scheduler.requests:
                engine.abort(rng.choice(sorted(engine.scheduler.requests)))
        if resets and steps and rng.random() < 0.15 and engine.can_reset():
            if rng.random() < 0.3:
                engine.scheduler.reset_prefix_cache(reset_running_requests=True)
            else:
                engine.scheduler.reset_connector_cache()  # running requests are stored anew
    for _ in range(2000):
        if not engine.scheduler.has_requests():
            break
        engine.step()
    for _ in range(4):
        engine.step()
    assert not engine.scheduler.requests
    return engine


@pytest.fixture(
    params=[
        "synchronous",
        "asynchronous",
        "chunks of two blocks",
        "little host memory",
        "no prefix cache",
    ]
)
def engine(request):
    lag, extra = 0, {"megabytes": 8}
    if request.param == "asynchronous":
        lag = 1
    elif request.param == "chunks of two blocks":
        extra["blocks_per_chunk"] = 2
    elif request.param == "little host memory":
        extra["megabytes"] = 0.75
    return lambda seed: SymbolicEngine(
        28, lag, lambda serial: (serial + seed) % 11 == 0, extra, max_num_batched_tokens=64,
        enable_prefix_caching=request.param != "no prefix cache",
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_whatever_is_stored_or_loaded_is_what_its_hash_says(engine, seed):
    played = random_load(engine(seed), random.Random(seed), 60)
    played.check_host()
    assert played.wrong == []
    assert played.num_checked > 500
    assert played.host.num_loaded > 10
    pool = played.manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert not played.manager.rows


def test_this_load_tells_when_a_connector_sees_compressed_rows(monkeypatch):
    monkeypatch.setattr(raw_rows._RawRows, "shown", lambda self, output: output)
    played = random_load(SymbolicEngine(28, max_num_batched_tokens=64), random.Random(0), 40, False)
    played.check_host()
    assert any(where == "host" for where, *_ in played.wrong)
