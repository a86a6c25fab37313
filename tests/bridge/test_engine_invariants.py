"""What the soak test checks after every step is caught when it is broken on purpose."""

from types import SimpleNamespace

import pytest
import torch
from cache_manager import build_cache
from vllm import SamplingParams
from vllm.v1.request import Request

from soaking.engine_invariants import BrokenInvariantError, EngineInvariants
from soaking.held_blocks import HeldBlocks
from vllm_kvzip.planning.reuse_rule import ReuseRule
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.vllm_bridge.scheduler.row_state import RowState

pytestmark = pytest.mark.vllm

BLOCK = 16
FORMULA = HeldBlocks(0.25, 10, BLOCK, min_prompt_tokens=64)


class Watch:
    """No bytes to look at: these blocks hold nothing."""

    def __init__(self):
        self.written, self.compared = [], {"raw": 3}

    def after_step(self, stepped):
        pass


@pytest.fixture
def engine(tmp_path):
    """A compressed request, decoding, and a short one that is left alone."""
    reuse = ReuseRule(fingerprint="00" * 16)
    cache, manager, hasher = build_cache(
        tmp_path, BLOCK, 60, reuse, keep_ratio=0.25, min_prompt_tokens=64
    )
    requests = []
    for name, length in (("long", 130), ("short", 40)):
        params = SamplingParams(max_tokens=9)
        request = Request(name, list(range(length)), params, None, block_hasher=hasher)
        cache.allocate_slots(request, length)
        manager.end_of_schedule({name})
        request.num_computed_tokens = length
        requests.append(request)
    scheduler = SimpleNamespace(
        kv_cache_manager=cache, running=requests, waiting=[], current_step=1
    )
    watch = Watch()
    checks = EngineInvariants(scheduler, watch, FORMULA)
    return SimpleNamespace(
        cache=cache, manager=manager, long=requests[0], scheduler=scheduler, watch=watch,
        checks=checks, rows=manager.req_to_blocks,
    )  # fmt: skip


def fold(engine):
    engine.cache.new_step_starts()
    assert engine.manager.rows["long"].run is not None


def test_a_healthy_engine_passes(engine):
    engine.checks.check()
    fold(engine)
    engine.checks.check()
    assert engine.checks.seen == {"crossing row": 1, "raw row": 2, "compressed row": 1}
    for request in list(engine.scheduler.running):
        engine.cache.free(request)
        engine.scheduler.running.remove(request)
    engine.checks.check_idle()
    assert engine.checks.seen["raw comparisons"] == 3


def lose_a_block(engine):
    engine.rows["short"].pop()


def own_it_twice(engine):
    engine.rows["short"][0] = engine.rows["long"][0]


def hold_one_too_many(engine):
    engine.rows["short"] += engine.cache.block_pool.get_new_blocks(1)


def keep_one_too_many(engine):
    fold(engine)
    row = engine.rows["long"]
    row[row.index(engine.cache.block_pool.null_block)] = engine.cache.block_pool.get_new_blocks(1)[
        0
    ]


def wait_with_blocks(engine):
    engine.scheduler.waiting.append(engine.scheduler.running.pop())


def write_to_a_cached_block(engine):
    engine.watch.written.append(7)


def compress_who_opted_out(engine):
    fold(engine)
    engine.long.sampling_params.extra_args = {"kvzip": "off"}


def keep_another_ratio(engine):
    fold(engine)
    engine.long.sampling_params.extra_args = {"kvzip_keep_ratio": 0.5}


def forget_to_compress(engine):
    engine.long.num_computed_tokens += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_block, "free and .* held blocks, but the pool has 59"),
        (own_it_twice, "free and .* held blocks|2 owners"),
        (hold_one_too_many, "short holds 4 blocks in a row of 4, not 3"),
        (keep_one_too_many, "long holds 4 blocks in a row of 9, not 2"),
        (wait_with_blocks, "short waits, and holds blocks"),
        (write_to_a_cached_block, r"cached blocks \[7\] were written to"),
        (compress_who_opted_out, "long is off, and compressed"),
        (keep_another_ratio, "long holds 3 blocks in a row of 9, not 4"),
        (forget_to_compress, "long has 131 tokens, and its 8 blocks are not compressed"),
    ],
)
def test_damage_is_seen(engine, damage, message):
    engine.checks.check()
    damage(engine)
    with pytest.raises(BrokenInvariantError, match=message):
        engine.checks.check()


def test_what_is_left_behind_is_seen(engine):
    with pytest.raises(BrokenInvariantError, match="blocks were not returned"):
        engine.checks.check_idle()
    for request in list(engine.scheduler.running):
        engine.cache.free(request)
        engine.scheduler.running.remove(request)
    engine.manager.rows["ghost"] = RowState(engine.long, None)
    with pytest.raises(BrokenInvariantError, match="rows is not empty"):
        engine.checks.check_idle()


def test_pages_of_other_blocks_are_seen(engine):
    fold(engine)
    pool = PagePool(num_blocks=60, num_layers=3, num_kv_heads=2)
    blocks = [block.block_id for block in engine.manager.rows["long"].run.blocks]
    right = pool.page_ids(torch.tensor(blocks)).flatten()
    tier = SimpleNamespace(page_ids=right)
    states = {"long": SimpleNamespace(prefix=SimpleNamespace(tiers=(tier,)))}
    prefixes, cache = SimpleNamespace(states=states), SimpleNamespace(pool=pool)
    worker = SimpleNamespace(prefixes=prefixes, cache=cache)

    def check():
        EngineInvariants(engine.scheduler, engine.watch, FORMULA, worker).check()

    check()
    for wrong in (right + 60, right[1:]):
        tier.page_ids = wrong
        with pytest.raises(BrokenInvariantError, match="long uses other pages"):
            check()
    states.clear()
    with pytest.raises(BrokenInvariantError, match="long is compressed, and its worker knows"):
        check()


def test_a_worker_that_reads_a_prefix_of_nobody_is_seen(engine):
    worker = SimpleNamespace(prefixes=SimpleNamespace(states={"short": None}))
    engine.checks = EngineInvariants(engine.scheduler, engine.watch, FORMULA, worker)
    with pytest.raises(BrokenInvariantError, match="short is not compressed, and its worker reads"):
        engine.checks.check()
