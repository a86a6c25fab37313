"""Batches as our kernel takes them: whoever is in them, and from inside a CUDA graph."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvzip.core import CacheGeometry, CompressedPrefix, PrefixPlan, StoredTier
from vllm_kvzip.kernels.reference import head_page_attention_reference
from vllm_kvzip.storage.head_pages import PagePool, deal_pages
from vllm_kvzip.storage.row_pages import RowPages
from vllm_kvzip.vllm_bridge.attention.batches import PrefixState
from vllm_kvzip.vllm_bridge.attention.gpu_attention import _last_requests
from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatcher
from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here"),
]

GEOMETRY = CacheGeometry(num_layers=2, num_kv_heads=2, group_size=2, head_dim=64, block_size=16)
POOL = PagePool(num_blocks=200, num_layers=2, num_kv_heads=2)
MOST_REQUESTS, WIDTH = 4, 12
LAYER = SimpleNamespace(layer_name="second")
IMPL = SimpleNamespace(scale=64**-0.5, logits_soft_cap=0, sinks=None)


class World:
    """A cache full of random numbers, requests with rows of blocks, and a step's metadata."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        pages = torch.randn(800, 16 * 2 * 64, generator=generator)
        store = RowPages(pages, 16, 64)
        names = {"first": 0, "second": 1}
        self.cache = HeadPageCache(GEOMETRY, POOL, pages, store, names)
        self.batcher = KernelBatcher(self.cache, MOST_REQUESTS)
        self.free = self.rng.permutation(np.arange(1, 200)).tolist()
        self.rows, self.states = {}, {}
        self.common = CommonAttentionMetadata(
            query_start_loc=torch.zeros(MOST_REQUESTS + 1, dtype=torch.int32),
            query_start_loc_cpu=torch.zeros(MOST_REQUESTS + 1, dtype=torch.int32),
            seq_lens=torch.zeros(MOST_REQUESTS, dtype=torch.int32),
            num_reqs=MOST_REQUESTS, num_actual_tokens=MOST_REQUESTS, max_query_len=1,
            max_seq_len=WIDTH * 16, slot_mapping=torch.zeros(MOST_REQUESTS, dtype=torch.int64),
            block_table_tensor=torch.zeros(MOST_REQUESTS, WIDTH, dtype=torch.int32),
        )  # fmt: skip

    def add(self, name, compressed):
        row = [self.free.pop() for _ in range(WIDTH)]
        self.rows[name] = row
        if compressed:
            boundary, held = 6, 2
            counts = self.rng.multinomial(held * 4 - 4, np.ones(4) / 4) + 1
            pages = torch.from_numpy(counts).view(2, 2)
            ids = deal_pages(torch.tensor(row[:held]), held * 4, POOL)
            plan = PrefixPlan(boundary * 16, boundary, held, boundary * 16, 0.3)
            self.states[name] = PrefixState(CompressedPrefix((StoredTier(ids, pages),)), plan)

    def step(self, names, query_lens):
        """Write a batch into vLLM's buffers, in place; gives queries."""
        common, count = self.common, len(names)
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        padded = torch.cat([starts, starts[-1:].expand(MOST_REQUESTS - count)])
        common.query_start_loc.copy_(padded)
        common.query_start_loc_cpu.copy_(padded)
        common.seq_lens.zero_()
        common.block_table_tensor.zero_()
        for index, name in enumerate(names):
            common.seq_lens[index] = int(self.rng.integers(110, WIDTH * 16))
            common.block_table_tensor[index] = torch.tensor(self.rows[name]).int()
        generator = torch.Generator().manual_seed(int(starts[-1]))
        return torch.randn(int(starts[-1]), 4, 64, generator=generator)

    def expected(self, names, query):
        """By another batcher's tables, all requests in it, pair by pair."""
        fresh = KernelBatcher(self.cache, MOST_REQUESTS)
        members = [self.states.get(name) for name in names]
        fresh._place_members(members, self.states)
        batch = fresh.batch(self.common, len(names), 0)
        return head_page_attention_reference(
            query, *self.cache.store.views(), self.common.query_start_loc[: len(names) + 1],
            batch.tables, 1, IMPL.scale,
        )  # fmt: skip


def attended(batch, query):
    output = torch.full_like(query, float("nan"))
    batch.attend(IMPL, LAYER, query, output)
    return output


def test_a_batch_that_was_captured_serves_whoever_comes_later():
    """As a CUDA graph does: made once for a dummy, launched again over the same buffers."""
    world = World(0)
    captured = world.batcher.batch(world.common, MOST_REQUESTS, 1)
    for name, compressed in (("a", True), ("b", False), ("c", True), ("d", True), ("e", False)):
        world.add(name, compressed)
    steps = (["a", "b"], ["b", "c", "a", "d"], ["c"], ["b", "e"], ["e", "d", "b"])
    for names in steps:
        query = world.step(names, [1] * len(names))
        world.batcher.split(names, world.common, world.states)
        padded = torch.cat([query, torch.zeros(MOST_REQUESTS - len(names), 4, 64)])
        output = attended(captured, padded)
        torch.testing.assert_close(output[: len(names)], world.expected(names, query))
        assert output[len(names) :].isnan().all()


def test_slots_are_reused_when_requests_end():
    world = World(1)
    for number in range(9):
        world.add(number, True)
        world.add(f"dense {number}", False)
        names = [f"dense {number}", number]
        query = world.step(names, [1, 1])
        split = world.batcher.split(names, world.common, world.states)
        torch.testing.assert_close(attended(split.compressed, query), world.expected(names, query))
        if number % 3:
            del world.states[number]
            world.free += world.rows.pop(number)
        world.free += world.rows.pop(f"dense {number}")
    assert len(world.batcher._slot_of) <= MOST_REQUESTS


def test_requests_behind_the_last_compressed_one_are_left_to_vllm():
    world = World(2)
    for name, compressed in (("a", False), ("b", True), ("c", False), ("d", False)):
        world.add(name, compressed)
    names = ["a", "b", "c", "d"]
    query = world.step(names, [1, 3, 5, 7])
    world.common.num_actual_tokens = len(query)
    split = world.batcher.split(names, world.common, world.states)
    assert split.dense_rows == slice(2, None)
    assert split.dense_tokens == slice(4, None)
    assert split.compressed.max_query_len == 3
    output = attended(split.compressed, query[:4])
    torch.testing.assert_close(output, world.expected(names, query)[:4])
    rest = _last_requests(world.common, 2, 4)
    assert rest.query_start_loc.tolist() == rest.query_start_loc_cpu.tolist() == [0, 5, 12]
    assert (rest.num_reqs, rest.num_actual_tokens, rest.max_query_len) == (2, 12, 7)
    assert torch.equal(rest.seq_lens, world.common.seq_lens[2:])
    assert torch.equal(rest.block_table_tensor, world.common.block_table_tensor[2:])


def test_nobody_compressed_is_vllms_path():
    world = World(3)
    world.add("a", False)
    world.step(["a"], [1])
    assert world.batcher.split(["a"], world.common, world.states) is None
