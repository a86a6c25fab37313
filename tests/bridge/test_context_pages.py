"""Pages of a context between workers that order them differently: what is read here is read there.

A CPU's kernel packs the elements of a page as its instruction set likes it, GPUs token by token.
"""

from types import SimpleNamespace

import pytest
import torch

from vllm_kvzip.core import CacheGeometry, CompressedPrefix, PrefixPlan, StoredTier
from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.quantization.choice import choose_quantization
from vllm_kvzip.storage.head_pages import PagePool, deal_pages
from vllm_kvzip.storage.page_store import PackedPages, PageCodec
from vllm_kvzip.storage.row_pages import RowPages
from vllm_kvzip.storage.stored_scales import StoredScales
from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
from vllm_kvzip.vllm_bridge.worker import context_pages
from vllm_kvzip.vllm_bridge.worker.context_pages import ContextPages
from vllm_kvzip.vllm_bridge.worker.prefixes import KeptRun, WorkerPrefixes

pytestmark = pytest.mark.vllm

LAYERS, HEADS, HEAD_DIM, BLOCK, NUM_BLOCKS, FIRST = 2, 2, 64, 32, 12, 4
GEOMETRY = CacheGeometry(LAYERS, HEADS, 2, HEAD_DIM, BLOCK)
PER_BLOCK = GEOMETRY.pages_per_block
QUANTIZATION = choose_quantization(
    page_bytes=2 * BLOCK * HEAD_DIM * 4, head_dim=HEAD_DIM, keys="nf4", values="nf4",
    rotation="auto",
)  # fmt: skip
FULL_PAGES = torch.tensor([[3, 1], [0, 4]])
EVICT = PrefixPlan(8 * BLOCK, 8, 2, ready_tokens=300, keep_ratio=0.25)
MIXED, QUANTIZE = (
    PrefixPlan(
        8 * BLOCK, 8, 1 + num_full, ready_tokens=300, keep_ratio=0.4, num_quantized_blocks=1,
        quantized_page_tokens=QUANTIZATION.layout.page_tokens, quantized_split=QUANTIZATION.split,
    )
    for num_full in (2, 0)
)  # fmt: skip


class World:
    """One worker's cache full of random numbers; ``kind`` is how its pages are ordered."""

    def __init__(self, kind, seed):
        torch.manual_seed(seed)
        elements = 2 * BLOCK * HEAD_DIM
        pages = torch.randn(NUM_BLOCKS * PER_BLOCK, elements)
        scales = None
        if kind == "packed":
            orders = (torch.randperm(BLOCK * HEAD_DIM) for _ in range(2))
            store = PackedPages(pages, PageCodec(*orders), BLOCK, HEAD_DIM, QUANTIZATION)
        elif kind == "rows":
            store = RowPages(pages, BLOCK, HEAD_DIM, QUANTIZATION)
        else:
            pages = torch.randint(0, 100, pages.shape, dtype=torch.uint8)
            factors = torch.ones(3, LAYERS, HEADS)
            eight, model = torch.float8_e4m3fn, torch.float32
            scales = StoredScales(eight, model, model, factors)
            store = RowPages(pages, BLOCK, HEAD_DIM, None, scales)
        self.cache = HeadPageCache(
            geometry=GEOMETRY, pool=PagePool(NUM_BLOCKS, LAYERS, HEADS), pages=pages, store=store,
            layer_index={}, quantization=None if scales else QUANTIZATION, scales=scales,
            num_first=FIRST,
        )  # fmt: skip
        self.unclean, self.prefixes = set(), WorkerPrefixes()
        unclean = SimpleNamespace(add=self.unclean.update)
        self.contexts = ContextPages(self.cache, self.prefixes, unclean)

    def keep(self, serial, plan, blocks):
        """A compressed prefix that lies there already."""
        targets = deal_pages(torch.tensor(blocks), len(blocks) * PER_BLOCK, self.cache.pool)
        full = targets[: plan.num_full_blocks * PER_BLOCK]
        pages = FULL_PAGES if plan.num_full_blocks else FULL_PAGES * 0
        tiers, transform = [StoredTier(full, pages)], None
        if plan.num_quantized_blocks:
            ids = QUANTIZATION.page_ids(targets[len(full) :])
            counts = torch.zeros(LAYERS, HEADS, dtype=torch.int64)
            counts[1, 0] = len(ids)
            tiers.append(StoredTier(ids, counts, QUANTIZATION.split))
            shape = (LAYERS, HEADS, HEAD_DIM)
            first = torch.randn(LAYERS, HEADS, FIRST, HEAD_DIM)
            transform = KeyTransform(torch.randn(shape), torch.rand(shape), first)
        scores = [None, None]
        if len(tiers) > 1 and plan.num_full_blocks:  # as with budgets in tokens
            scores = [
                torch.rand(len(full) * BLOCK),
                torch.rand(len(ids) * QUANTIZATION.layout.page_tokens),
            ]
        prefix = CompressedPrefix(tuple(tiers), scores[0], transform, quantized_scores=scores[1])
        self.prefixes.keep(serial, KeptRun(prefix, plan, 7))

    def logical(self, serial):
        """What attention would see of a run."""
        prefix = self.prefixes.kept(serial).prefix
        ids, store = prefix.page_ids[None], self.cache.store
        found = [store.read_keys(ids, 0), store.read_values(ids, 0), prefix.pages, prefix.offsets]
        if (tier := prefix.quantized) is not None:
            pages = QUANTIZATION.pages_of(self.cache.pages)[tier.page_ids]
            transform = prefix.key_transform
            found += [pages, tier.pages, prefix.offsets_of(1), transform.packed]
            if prefix.scores is not None:
                found += [prefix.scores, prefix.quantized_scores]
        return found


@pytest.mark.parametrize("plan", [EVICT, MIXED, QUANTIZE], ids=["evict", "mixed", "quantize"])
@pytest.mark.parametrize(
    ("here", "there"),
    [("packed", "packed"), ("packed", "rows"), ("rows", "packed"), ("eight bits", "eight bits")],
)
def test_what_is_read_here_is_read_there(here, there, plan, monkeypatch):
    monkeypatch.setattr(context_pages, "PAGES_AT_ONCE", 3)
    if here == "eight bits":
        plan = EVICT
    left, came = World(here, 1), World(there, 2)
    left.keep(5, plan, [3, 1, 8][: plan.num_compressed_blocks])
    tensors = left.contexts.read(5)
    blocks = [9, 2, 6][: plan.num_compressed_blocks]
    untouched = came.cache.pool.page_ids(
        torch.tensor([block for block in range(NUM_BLOCKS) if block not in blocks])
    ).flatten()
    before = came.cache.pages[untouched].clone()
    assert came.contexts.write(11, plan, 7, blocks, tensors) is None
    for a, b in zip(left.logical(5), came.logical(11), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert torch.equal(came.cache.pages[untouched], before)
    assert came.unclean == set(blocks[plan.num_full_blocks :])
    again = came.contexts.read(11)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())


def test_a_run_that_is_not_there_is_none():
    assert World("packed", 1).contexts.read(5) is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"full.keys": torch.zeros(8, BLOCK, HEAD_DIM).half()}, "its full.keys is not"),
        ({"full.values": torch.zeros(7, BLOCK, HEAD_DIM)}, "its full.values is not"),
        ({"full.pages": FULL_PAGES * 2}, "the pages of its heads are not 8"),
        ({"full.pages": torch.tensor([[-1, 4], [1, 4]])}, "the pages of its heads are not 8"),
        ({"more": torch.zeros(1)}, "it has the tensors"),
        ({"scores": torch.zeros(3)}, "its scores is not"),
    ],
)
def test_what_does_not_suit_the_cache_is_refused_and_nothing_written(changes, sentence):
    world = World("packed", 1)
    world.keep(5, EVICT, [3, 1])
    tensors, before = world.contexts.read(5), world.cache.pages.clone()
    assert sentence in world.contexts.write(6, EVICT, 7, [9, 2], {**tensors, **changes})
    assert "another number of blocks" in world.contexts.write(6, EVICT, 7, [9], tensors)
    assert world.prefixes.kept(6) is None
    assert torch.equal(world.cache.pages, before)
