"""Block manager and worker book-keeping together, on vLLM's own pool, through random histories.

A small scheduler drives vLLM's `KVCacheManager` with our spec: chunked prefill, decode, prefix
hits, preemption, resumption and aborts at any moment. The worker's side sees what a worker would
see. After every step the pool must add up, and both sides must hold the same row.
"""

import random
from collections import Counter

import pytest
import torch
from scheduler_steps import new_request, output
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_kvzip.head_pages import fold_row
from vllm_kvzip.vllm_bridge.cache_spec import HeadPageSpec
from vllm_kvzip.vllm_bridge.requests import RequestTracker

pytestmark = pytest.mark.vllm

BLOCK, NUM_BLOCKS, CHUNK = 16, 48, 48


class World:
    """Scheduler, pool and worker of one random history."""

    def __init__(self, seed, directory):
        self.random = random.Random(seed)
        init_none_hash(sha256)
        self.spec = HeadPageSpec(
            block_size=BLOCK, num_kv_heads=2, head_size=8, dtype=torch.float32,
            keep_ratio=self.random.choice([0.2, 0.5, 1.0]), min_prompt_tokens=40, sink_tokens=2,
            recent_tokens=8, num_layers=3, metrics_directory=str(directory),
        )  # fmt: skip
        config = KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], self.spec)])
        self.cache = KVCacheManager(
            config, max_model_len=512, scheduler_block_size=BLOCK, hash_block_size=BLOCK,
            enable_caching=True,
        )  # fmt: skip
        self.manager = self.cache.coordinator.single_type_managers[0]
        self.hasher = get_request_block_hasher(BLOCK, sha256)
        self.waiting, self.running = [], []
        self.tracker = RequestTracker(self.spec.rule)
        self.pending, self.rows = [], {}  # the worker's
        self.done = []  # finished in the last step
        self.events = Counter()
        self.number = 0

    def add(self):
        stem = [1 + self.random.randrange(3)] * self.random.choice([0, 64, 100])
        prompt = stem + [self.random.randrange(1000) for _ in range(self.random.randint(1, 90))]
        params = SamplingParams(max_tokens=self.random.randint(1, 160))
        self.waiting.append(
            Request(str(self.number), prompt, params, None, block_hasher=self.hasher)
        )
        self.number += 1

    def step(self):
        finished = self._abort_some()
        scheduled, running, preempted = {}, [], []
        for request in list(self.running):
            if request not in self.running:
                continue  # preempted by an earlier one of this step
            count = min(CHUNK, request.num_tokens - request.num_computed_tokens)
            blocks = self.cache.allocate_slots(request, count)
            while blocks is None:
                victim = self.running.pop()
                self._preempt(victim)
                preempted.append(victim.request_id)
                scheduled.pop(victim.request_id, None)
                running = [item for item in running if item[0] != victim.request_id]
                if victim is request:
                    break
                blocks = self.cache.allocate_slots(request, count)
            if blocks is not None:
                ids = blocks.get_block_ids(allow_none=True)
                running.append(
                    (request.request_id, request.num_computed_tokens, ids and list(ids[0]))
                )
                scheduled[request.request_id] = count
        new, resumed = [], []
        while self.waiting and not preempted:
            request = self.waiting[0]
            hit, num_hit, _ = self.cache.get_computed_blocks(request)
            count = min(CHUNK, request.num_tokens - num_hit)
            granted = self.cache.allocate_slots(
                request, count, num_new_computed_tokens=num_hit, new_computed_blocks=hit,
                full_sequence_must_fit=True,
            )  # fmt: skip
            if granted is None:
                break
            self.events["prefix hit"] += num_hit > 0
            ids = list(self.cache.get_block_ids(request.request_id)[0])
            request.num_computed_tokens = num_hit
            if request.status == RequestStatus.PREEMPTED:
                resumed.append(request.request_id)
                running.append((request.request_id, num_hit, ids))
            else:
                new.append(new_request(request.request_id, request.num_prompt_tokens, ids, num_hit))
            request.status = RequestStatus.RUNNING
            self.running.append(self.waiting.pop(0))
            scheduled[request.request_id] = count
        self._work(output(new, running, scheduled, finished, resumed, preempted))
        for request in list(self.running):
            request.num_computed_tokens += scheduled.get(request.request_id, 0)
            if request.num_computed_tokens == request.num_tokens:
                request.append_output_token_ids(self.random.randrange(1000))
                if request.num_output_tokens >= request.max_tokens:
                    self.running.remove(request)
                    self.cache.free(request)
                    self.done.append(request.request_id)

    def _abort_some(self):
        finished, self.done = self.done, []
        if self.random.random() < 0.05 and (self.running or self.waiting):
            victim = self.random.choice(self.running + self.waiting)
            (self.running if victim in self.running else self.waiting).remove(victim)
            self.cache.free(victim)
            self.events["abort"] += 1
            finished = [*finished, victim.request_id]
        return finished

    def _preempt(self, request):
        self.cache.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)
        self.events["preemption"] += 1

    def _work(self, step):
        """What worker and model runner do with a step."""
        self.tracker.drop_ended(step)
        for rid in step.finished_req_ids:
            self.rows.pop(rid, None)
        for request in self.pending:
            if self.tracker.get(request.request_id) is request and request.crossed:
                start = request.reserve_start
                request.block_ids = fold_row(request.block_ids, request.plan, start, 0)
                request.folded = True
                self.rows[request.request_id] = list(request.block_ids)
                self.events["compression"] += 1
        self.tracker.advance(step)
        for new in step.scheduled_new_reqs:
            self.rows[new.req_id] = list(new.block_ids[0])
        cached = step.scheduled_cached_reqs
        for rid, ids in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if rid in cached.resumed_req_ids:
                self.rows[rid] = []
            self.rows[rid].extend(ids[0] if ids else [])
        self.pending = list(self.tracker.crossing(step))
        for rid in step.num_scheduled_tokens:
            row = [block.block_id for block in self.manager.req_to_blocks[rid]]
            assert self.rows[rid] == row  # the same blocks at the same logical places
            assert self._output_blocks_are_private(rid, row)

    def _output_blocks_are_private(self, rid, row):
        """Blocks that hold output belong to nobody else and are never published."""
        request = next(r for r in self.running if r.request_id == rid)
        reserve = self.manager._reserved.get(rid)
        blocks = row[request.num_prompt_tokens // BLOCK : reserve.start if reserve else None]
        pool = self.cache.block_pool.blocks
        if rid not in self.manager._plans:
            return all(pool[block].ref_cnt == 1 for block in blocks)
        return all(pool[block].ref_cnt == 1 and pool[block].block_hash is None for block in blocks)

    def check_pool(self):
        held = Counter(
            block.block_id
            for row in self.manager.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        pool = self.cache.block_pool
        assert pool.get_num_free_blocks() + len(held) == NUM_BLOCKS - 1
        assert all(pool.blocks[block].ref_cnt == count for block, count in held.items())
        for rid, saved in self.manager._blocks_saved.items():
            plan = self.manager._plans[rid]
            row = self.manager.req_to_blocks[rid]
            tail = len(row) - plan.num_prefix_blocks
            assert saved == plan.num_prefix_blocks - plan.num_compressed_blocks
            assert sum(not block.is_null for block in row) == plan.num_compressed_blocks + tail


@pytest.mark.parametrize("seed", range(12))
def test_random_histories_keep_pool_and_rows_in_order(seed, tmp_path):
    world = World(seed, tmp_path)
    for step in range(400):
        if world.random.random() < 0.25 and step < 330:
            world.add()
        world.step()
        world.check_pool()
    for _ in range(2000):
        if not (world.running or world.waiting):
            break
        world.step()
        world.check_pool()
    assert world.events["compression"] > 10
    assert world.events["preemption"] > 0
    assert world.events["abort"] > 0
    assert world.events["prefix hit"] > 0
    assert world.cache.block_pool.get_num_free_blocks() == NUM_BLOCKS - 1
    manager = world.manager
    for left in (manager._plans, manager._prompt_tokens, manager._reserved, manager._blocks_saved):
        assert not left
