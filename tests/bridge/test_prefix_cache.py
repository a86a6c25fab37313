"""Compressed prefixes in vLLM's own block pool: who finds them, and who must not."""

import gc
import threading
import time
from types import SimpleNamespace

import pytest
from cache_manager import build_cache
from metric_processes import collected
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.v1.request import Request

from vllm_kvzip.config import KVzipConfig
from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.metrics import EVICTION_REASONS
from vllm_kvzip.planning.reuse_rule import ReuseRule
from vllm_kvzip.vllm_bridge.scheduler.idle_expiry import IdleExpiry
from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import CompressedPrefixCache
from vllm_kvzip.vllm_bridge.scheduler.scheduler import introduce_requests
from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.worker.prefixes import UseTimes

pytestmark = pytest.mark.vllm

BLOCK, NUM_BLOCKS = 16, 200
FINGERPRINTS = ("00" * 16, "01" * 16)


class Recorder:
    """Counts what the prefix cache reports."""

    def __init__(self):
        self.entries, self.evicted = 0, []

    def prefix_cached(self):
        self.entries += 1

    def prefix_evicted(self, reason):
        assert reason in EVICTION_REASONS
        self.entries -= 1
        self.evicted.append(reason)


class Engine:
    """vLLM's cache manager with ours inside; every request is prefilled in one step."""

    def __init__(self, directory, **reuse):
        rule = ReuseRule(**{"fingerprint": FINGERPRINTS[0], **reuse})
        self.cache, self.manager, self.hasher = build_cache(
            directory, BLOCK, NUM_BLOCKS, rule, keep_ratio=0.25, min_prompt_tokens=64
        )
        self.number = 0

    def serve(self, tokens, context=None, options=None, **fields):
        """Prefill a prompt, and end it; what it hit, and whether it left a compressed prefix."""
        extra = dict(options or {})
        if context is not None:
            extra["kvzip_context_tokens"] = context
        params = SamplingParams(max_tokens=2, extra_args=extra)
        request = Request(
            str(self.number), list(tokens), params, None, block_hasher=self.hasher, **fields
        )
        self.number += 1
        hit, num_hit, _ = self.cache.get_computed_blocks(request)
        granted = self.cache.allocate_slots(
            request, request.num_tokens - num_hit, num_new_computed_tokens=num_hit,
            new_computed_blocks=hit, full_sequence_must_fit=True,
        )  # fmt: skip
        assert granted is not None
        message = self.manager.end_of_schedule({request.request_id})
        kept = bool(message and message.kept)
        compressed_hit = bool(message and message.hits)
        self.cache.free(request)
        return ("compressed" if compressed_hit else "raw", num_hit), kept


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path)


CONTEXT = list(range(1, 129))
QUESTION = [500, 501, 502]


def test_the_declared_context_is_what_is_shared(engine):
    assert engine.serve([*CONTEXT, *QUESTION], 128) == (("raw", 0), True)
    assert engine.serve([*CONTEXT, 7, 8], 128) == (("compressed", 128), False)
    assert engine.serve([*CONTEXT, 7, 8]) == (("compressed", 128), False)
    assert engine.serve([*CONTEXT[:96], 7, 8], 96) == (("raw", 96), True)  # its own context
    assert engine.serve([*CONTEXT[:96], 9], 96) == (("compressed", 96), False)
    assert engine.serve([*CONTEXT, 7, 8], 130)[0] == ("compressed", 128)  # the same whole blocks


def test_a_whole_prompt_is_the_context_unless_declared(engine):
    assert engine.serve(CONTEXT[:100]) == (("raw", 0), True)
    assert engine.serve(CONTEXT) == (("compressed", 96), False)
    long = [*CONTEXT, *range(600, 900)]
    assert engine.serve(long) == (("raw", 96), True)  # most of it would have stayed dense
    assert engine.serve([*long, 5]) == (("compressed", 416), False)


def test_a_request_shares_prefixes_of_its_own_keep_ratio_only(engine):
    much, little = {"kvzip_keep_ratio": 0.75}, {"kvzip_keep_ratio": 0.25}
    assert engine.serve([*CONTEXT, *QUESTION], 128) == (("raw", 0), True)
    assert engine.serve([*CONTEXT, 7], 128, much) == (("raw", 128), True)
    assert engine.serve([*CONTEXT, 8], 128, much) == (("compressed", 128), False)
    assert engine.serve([*CONTEXT, 9], 128, little) == (("compressed", 128), False)  # the server's
    assert [len(run.blocks) for run in engine.manager.prefixes._runs.values()] == [6, 2]


def test_a_request_that_is_off_takes_and_leaves_no_compressed_prefix(engine):
    off = {"kvzip": "off"}
    assert engine.serve([*CONTEXT, *QUESTION], options=off) == (("raw", 0), False)
    engine.serve([*CONTEXT, *QUESTION], 128)
    assert engine.serve([*CONTEXT, 7], options=off) == (("raw", 128), False)
    assert engine.serve([*CONTEXT, 7])[0] == ("compressed", 128)


def test_the_last_token_is_always_computed(engine):
    engine.serve(CONTEXT, 128)
    assert engine.serve(CONTEXT, 128)[0] == ("raw", 112)
    assert engine.serve([*CONTEXT, 1], 128)[0] == ("compressed", 128)


def test_rows_are_folded_before_anybody_asks_for_blocks(engine):
    """vLLM serves running requests in order and preempts the last one when blocks run out."""
    pool = engine.cache.block_pool
    request = Request("x", CONTEXT, SamplingParams(max_tokens=9), None, block_hasher=engine.hasher)
    engine.cache.allocate_slots(request, len(CONTEXT))
    engine.manager.end_of_schedule({"x"})
    request.num_computed_tokens = request.num_in_flight_tokens = len(CONTEXT)
    before = pool.get_num_free_blocks()
    engine.cache.new_step_starts()
    assert pool.get_num_free_blocks() == before  # its step has not been processed yet
    request.num_in_flight_tokens = 0
    engine.cache.new_step_starts()
    assert pool.get_num_free_blocks() == before + len(CONTEXT) // BLOCK
    engine.cache.free(request)


def test_adapters_and_salts_do_not_share(engine):
    engine.serve([*CONTEXT, *QUESTION], 128)
    lora = LoRARequest("adapter", 1, "/nowhere")
    assert engine.serve([*CONTEXT, 7], 128, cache_salt="s") == (("raw", 0), True)
    assert engine.serve([*CONTEXT, 7], 128, lora_request=lora) == (("raw", 0), True)
    assert engine.serve([*CONTEXT, 8], 128, lora_request=lora)[0] == ("compressed", 128)


def test_scorers_that_look_at_queries_share_declared_contexts_only(tmp_path):
    engine = Engine(tmp_path, observation_tokens=32)
    assert engine.serve([*CONTEXT, *QUESTION]) == (("raw", 0), False)
    # All of its context is found raw: the scorer never saw the context's last queries.
    assert engine.serve([*CONTEXT, 7], 128) == (("raw", 128), False)
    assert engine.serve([*CONTEXT[:90], 7], 90) == (("raw", 80), False)
    other = list(range(1000, 1128))
    assert engine.serve([*other, 7], 128) == (("raw", 0), True)
    assert engine.serve([*other, 8], 128) == (("compressed", 128), False)


def test_another_fingerprint_finds_nothing(engine, tmp_path):
    """Two caches over one pool, as if the settings had changed under it."""
    engine.serve([*CONTEXT, *QUESTION], 128)
    hashes = Request("x", CONTEXT, SamplingParams(), None, block_hasher=engine.hasher).block_hashes
    pool, found = engine.cache.block_pool, {}
    run = engine.manager.prefixes.find(hashes, 8, (0.25, None), lambda _: True)
    for fingerprint in FINGERPRINTS:
        cache = CompressedPrefixCache(pool, 0, ReuseRule(fingerprint), Recorder())
        keys = cache._keys(run)
        found[fingerprint] = [pool.cached_block_hash_to_block.get_one_block(key) for key in keys]
    assert found[FINGERPRINTS[0]] == run.blocks
    assert found[FINGERPRINTS[1]] == [None] * len(run.blocks)


@pytest.mark.parametrize(
    "change",
    [
        {"scorer": "knorm"}, {"budget": "uniform"}, {"sink_tokens": 1},
        {"recent_tokens": 1}, {"seed": 1}, {"observation_window_tokens": 8}, {"fractions": 0.7},
        {"importance": 0.7}, {"block_size": 64},
        {"repeat": [[1], [2]]}, {"scoring_chunk_tokens": 64}, {"prefill_budget": 640},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_everything_that_shapes_a_prefix_is_in_the_fingerprint(change):
    def fingerprint(
        scorer="keydiff",
        budget="adaptive",
        fractions=0.3,
        importance=0.3,
        block_size=32,
        repeat=None,
        **config,
    ):
        settings = Settings(
            KVzipConfig(**config), scorer, budget, {"0.5": [[fractions]]}, [[importance]], repeat
        )
        return settings.fingerprint(block_size)

    assert fingerprint() == fingerprint(min_prompt_tokens=1, prefix_reuse="raw")
    assert fingerprint(**change) != fingerprint()


def test_eviction_of_one_block_ends_the_run_and_tells_the_workers(engine):
    engine.serve([*CONTEXT, *QUESTION], 128)
    assert len(engine.manager.prefixes) == 1
    pool = engine.cache.block_pool
    taken = pool.get_new_blocks(pool.get_num_free_blocks())
    engine.manager.prefixes.blocks_taken(taken)
    assert len(engine.manager.prefixes) == 0
    assert engine.manager.end_of_schedule(()).dropped
    assert engine.manager.end_of_schedule(()) is None
    pool.free_blocks(taken)
    assert engine.serve([*CONTEXT, 7], 128) == (("raw", 0), True)


def test_a_prefix_in_use_outlives_its_time(engine, tmp_path):
    now = [0.0]
    engine = Engine(tmp_path, ttl_seconds=10.0)
    prefixes = engine.manager.prefixes
    prefixes._clock = lambda: now[0]
    engine.serve([*CONTEXT, *QUESTION], 128)
    now[0] = 9.0
    assert engine.serve([*CONTEXT, 7], 128)[0] == ("compressed", 128)
    now[0] = 18.0
    assert engine.serve([*CONTEXT, 8], 128)[0] == ("compressed", 128)  # used nine seconds ago
    now[0] = 28.5
    assert engine.serve([*CONTEXT, 9], 128)[0] == ("raw", 128)
    assert len(prefixes) == 1  # compressed anew


def eventually(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def with_a_clock(engine):
    """The time by which the engine's prefixes expire, to be set."""
    now = [0.0]
    engine.manager.prefixes._clock = lambda: now[0]
    return now


def test_prefixes_end_in_time_while_no_request_comes(tmp_path):
    engine = Engine(tmp_path, ttl_seconds=0.05)
    now, prefixes, lock = with_a_clock(engine), engine.manager.prefixes, threading.RLock()
    expiry = IdleExpiry(prefixes, 0.05, lock)
    with lock:
        engine.serve([*CONTEXT, *QUESTION], 128)
        engine.serve([*range(1000, 1128), 7], 128)
        now[0] = 0.06
        time.sleep(0.3)
        assert len(prefixes) == 2  # nothing expires while the lock is held
    assert eventually(lambda: len(prefixes) == 0)
    value = collected(tmp_path)
    assert value("vllm_kvzip_prefix_entries") == 0
    assert value("vllm_kvzip_prefix_evictions_total", {"reason": "ttl"}) == 2
    with lock:
        assert engine.serve([*CONTEXT, 9], 128)[1]  # afresh
    now[0] = 0.12
    assert eventually(lambda: len(prefixes) == 0)
    expiry.stop()


def test_a_prefix_in_use_does_not_end(tmp_path):
    engine = Engine(tmp_path, ttl_seconds=8)
    now, prefixes = with_a_clock(engine), engine.manager.prefixes
    engine.serve([*CONTEXT, *QUESTION], 128)
    (run,) = prefixes._runs.values()
    run.users, now[0] = 1, 9
    assert prefixes.expire() == 8
    run.users, now[0] = 0, 16
    assert prefixes.expire() == 1
    now[0] = 17
    assert prefixes.expire() is None
    assert len(prefixes) == 0


def test_the_thread_ends_with_its_cache(tmp_path):
    engine = Engine(tmp_path, ttl_seconds=0.05)
    before = threading.active_count()
    IdleExpiry(engine.manager.prefixes, 0.05, threading.RLock())
    assert threading.active_count() == before + 1
    del engine
    assert eventually(lambda: gc.collect() >= 0 and threading.active_count() == before)


def test_a_worker_lists_what_is_not_over():
    now = [0.0]
    uses = UseTimes(10, lambda: now[0])
    uses.starts("a", 1)
    now[0] = 9
    uses.step()  # a still runs
    uses.ends("a")
    now[0] = 18
    assert not uses.is_over(1)
    uses.step()
    now[0] = 19
    assert uses.is_over(1)
    uses.starts("b", 1)
    assert not uses.is_over(1)
    assert not UseTimes(None).is_over(1)


def test_hashes_of_parts_of_blocks_are_refused(tmp_path):
    engine = Engine(tmp_path)
    engine.cache.block_pool.hash_block_size = BLOCK // 2
    with pytest.raises(UnsupportedError, match="hashes 8 tokens at once beside blocks of 16"):
        introduce_requests(engine.cache, SimpleNamespace(group_id=0))
