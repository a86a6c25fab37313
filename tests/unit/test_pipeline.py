"""Compaction and the whole pipeline on a synthetic pool, against a loop over single tokens."""

from typing import get_args

import pytest
import torch

from vllm_kvzip.budgeting.kept_positions import KeptPositions
from vllm_kvzip.config import Budget
from vllm_kvzip.core import CacheGeometry, KeepPlan
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.registry import SCORERS
from vllm_kvzip.scoring import Scorer, create_scorer, register_scorer
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.storage.page_store import PackedPages, PageCodec

BY_HEAD = ("profile", "retrieval")
GEOMETRY = CacheGeometry(num_layers=3, num_kv_heads=2, group_size=2, head_dim=8, block_size=4)
POOL = PagePool(num_blocks=64, num_layers=3, num_kv_heads=2)


def shuffled_codec(seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = GEOMETRY.block_size * GEOMETRY.head_dim
    return PageCodec(
        torch.randperm(size, generator=generator), torch.randperm(size, generator=generator)
    )


def empty_pages(dtype=torch.float32):
    size = 2 * GEOMETRY.block_size * GEOMETRY.head_dim
    return torch.full((64 * 6, size), float("nan"), dtype=dtype)


def store_of(pages, codec):
    return PackedPages(pages, codec, GEOMETRY.block_size, GEOMETRY.head_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ["shuffled", "by token", "by dimension"])
def test_pages_are_written_in_the_codecs_order_and_read_back(dtype, order):
    codec, pages = shuffled_codec(), empty_pages(dtype)
    if order == "by token":
        codec = PageCodec.identity(4, 8)
    elif order == "by dimension":
        codec = PageCodec(torch.arange(32).view(4, 8).t().flatten(), torch.arange(32))
    keys, values = torch.randn(2, 8, 8).to(dtype), torch.randn(2, 8, 8).to(dtype)
    ids = torch.tensor([[7, 3], [11, 5]])
    store_of(pages, codec).write(ids.flatten(), keys.view(-1, 8), values.view(-1, 8))
    store = store_of(pages, codec)
    assert torch.equal(store.read_keys(ids, 0), keys)
    assert torch.equal(store.read_values(ids, 0), values)
    page = pages[3]  # head 0, tokens 4..7
    for stored, logical in enumerate(codec.key_order.tolist()):
        assert page[stored] == keys[0, 4 + logical // 8, logical % 8]
    untouched = [i for i in range(len(pages)) if i not in (3, 5, 7, 11)]
    assert pages[untouched].isnan().all()


def test_a_codec_must_be_a_permutation():
    with pytest.raises(ValueError, match="not a permutation"):
        PageCodec(torch.zeros(4, dtype=torch.int64), torch.arange(4))


def test_compaction_never_writes_to_its_source():
    store = store_of(empty_pages(), shuffled_codec())
    keep = KeepPlan(torch.arange(4)[None], torch.tensor([[1]]))
    with pytest.raises(ValueError, match="own pages"):
        store.compact(torch.tensor([[[1, 2]]]), keep, torch.tensor([2]))


def fill_prompt(pages, codec, blocks):
    """Random KV of a prompt; returns keys and values ``[L, H, T, D]``."""
    keys = torch.randn(3, 2, len(blocks) * 4, 8)
    values = torch.randn_like(keys)
    ids = POOL.page_ids(torch.tensor(blocks))
    for layer in range(3):
        store_of(pages, codec).write(
            ids[layer].flatten(), keys[layer].reshape(-1, 8), values[layer].reshape(-1, 8)
        )
    return keys, values


def compressor(store, budget, keep_ratio=0.5, scorer="knorm", **changes):
    rule = PrefixRule(keep_ratio, 0, sink_tokens=2, recent_tokens=2, block_size=4)
    values = {"store": store, "scorer": create_scorer(scorer), "budget": budget}
    values |= {"rule": rule, **changes}
    return Compressor(geometry=GEOMETRY, pool=POOL, **values), rule


@pytest.mark.parametrize("budget", get_args(Budget))
@pytest.mark.parametrize("keep_ratio", [0.25, 0.5, 1.0])
def test_kept_pairs_lie_in_the_dealt_pages(budget, keep_ratio):
    torch.manual_seed(3)
    fractions = [[1.0, 0.1], [0.2, 0.3], [0.9, 0.5]] if budget in BY_HEAD else None
    pages, codec = empty_pages(), shuffled_codec()
    press, rule = compressor(
        store_of(pages, codec), budget, keep_ratio,
        head_fractions=lambda _: fractions, head_importance=fractions,
    )  # fmt: skip
    source = [9, 4, 17, 30, 2, 8, 41, 22]
    keys, values = fill_prompt(pages, codec, source)
    plan = rule.plan(34)
    target = [50, 12, 33, 60, 1, 5, 7, 13][: plan.num_compressed_blocks]
    before, record = pages.clone(), KeptPositions()
    prefix, stages = press.compress(
        source_blocks=source, target_blocks=target, plan=plan,
        observation_queries=None, scale=1.0, seed=0, record=record,
    )  # fmt: skip
    (recorded,) = record.masks(plan.boundary_tokens)
    assert int(prefix.pages.sum()) == plan.num_compressed_blocks * 6
    assert stages.finished
    assert set(stages.seconds()) == {"score", "select", "compact"}
    source_ids = POOL.page_ids(torch.tensor(source)).flatten()
    assert torch.equal(pages[source_ids], before[source_ids])
    start = 0
    for layer in range(3):
        for head in range(2):
            count = int(prefix.pages[layer, head])
            ids = prefix.page_ids[start : start + count]
            start += count
            store = store_of(pages, codec)
            kept_keys = store.read_keys(ids[None], layer)
            kept_values = store.read_values(ids[None], layer)
            norms = keys[layer, head].norm(dim=-1)
            norms[:2] = norms[-2:] = -1.0  # sinks and recent tokens
            best = norms.argsort(stable=True)[: count * 4].sort().values
            assert torch.equal(kept_keys[0], keys[layer, head, best])
            assert torch.equal(recorded[layer, head].nonzero().flatten(), best)
            assert torch.equal(kept_values[0], values[layer, head, best])
    if keep_ratio == 1.0:
        assert (prefix.pages == 8).all()
    if budget == "adaptive-per-layer":
        assert len(prefix.pages.sum(dim=1).unique()) == 1


def test_skewed_profile_keeps_one_layer_whole_in_the_blocks_of_the_ratio():
    fractions = [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    importance = [[0.5, 0.4], [1.0, 1.0], [0.3, 0.2]]
    pages = empty_pages()
    press, rule = compressor(
        store_of(pages, shuffled_codec()), "profile", keep_ratio=0.41,
        head_fractions=lambda _: fractions, head_importance=importance,
    )  # fmt: skip
    fill_prompt(pages, shuffled_codec(), list(range(8)))
    plan = rule.plan(32)
    assert plan.num_compressed_blocks == 4  # 24 pages: layer 1 takes all its 16, each other one
    prefix, _ = press.compress(
        source_blocks=range(8), target_blocks=range(20, 24), plan=plan,
        observation_queries=None, scale=1.0, seed=0,
    )  # fmt: skip
    assert prefix.pages.tolist() == [[5, 1], [8, 8], [1, 1]]
    assert len(prefix.page_ids.unique()) == 24


def test_a_scorer_is_one_class(monkeypatch):
    """Registered here, chosen by its name, and no other code knows of it."""
    monkeypatch.setattr(SCORERS, "_registered", dict(SCORERS._registered))

    @register_scorer
    class Largest(Scorer):
        name = "largest"
        needs_values = True

        def score_layer(self, inputs):
            return inputs.values.abs().sum(dim=-1)

    pages, codec = empty_pages(), shuffled_codec()
    press, rule = compressor(store_of(pages, codec), "uniform", scorer="largest")
    source, target = [9, 4, 17, 30, 2, 8, 41, 22], [50, 12, 33, 60]
    _, values = fill_prompt(pages, codec, source)
    prefix, _ = press.compress(
        source_blocks=source, target_blocks=target, plan=rule.plan(34),
        observation_queries=None, scale=1.0, seed=0,
    )  # fmt: skip
    sizes = values.abs().sum(dim=-1)
    sizes[:, :, :2] = sizes[:, :, -2:] = float("inf")
    best = sizes.argsort(dim=-1, descending=True)[:, :, :16].sort().values
    wanted = values.gather(2, best[..., None].expand(-1, -1, -1, 8))
    found = store_of(pages, codec).read_values(prefix.page_ids.view(6, 4), 0)
    assert torch.equal(found, wanted.flatten(0, 1))


def test_a_profile_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="profile of"):
        compressor(None, "profile", head_fractions=lambda _: [[0.5]], head_importance=[[0.5]])


@pytest.mark.parametrize("recent", [2, 10])  # 10: more than a round's new tokens
@pytest.mark.parametrize("budget", get_args(Budget))
def test_what_was_kept_competes_with_what_is_new(budget, recent):
    """Two rounds and a last compression, against a loop that ranks single pairs by head."""
    torch.manual_seed(5)
    fractions = [[1.0, 0.1], [0.2, 0.3], [0.9, 0.5]] if budget in BY_HEAD else None
    rule = PrefixRule(0.25, 0, sink_tokens=2, recent_tokens=recent, block_size=4, prefill_blocks=4)
    pages, codec = empty_pages(), shuffled_codec()
    store = store_of(pages, codec)
    press, _ = compressor(
        store, budget, rule=rule, head_fractions=lambda _: fractions, head_importance=fractions
    )
    keys, values = torch.randn(3, 2, 40, 8), torch.randn(3, 2, 40, 8)
    norms = -keys.norm(dim=-1)  # scorer knorm
    kept = {(layer, head): [] for layer in range(3) for head in range(2)}
    free, prefix, done = list(range(64)), None, None
    while (plan := rule.next_plan(40, done=done)) is not None and plan.ready_tokens <= 40:
        dense = [free.pop(0) for _ in range(plan.num_prefix_blocks - plan.start_blocks)]
        span = slice(plan.start_blocks * 4, plan.boundary_tokens)
        for layer in range(3):
            ids = POOL.page_ids(torch.tensor(dense))[layer].flatten()
            store.write(
                ids, keys[layer, :, span].reshape(-1, 8), values[layer, :, span].reshape(-1, 8)
            )
        target = [free.pop(0) for _ in range(plan.num_compressed_blocks)]
        before = pages.clone()
        prefix, _ = press.compress(
            source_blocks=dense, target_blocks=target, plan=plan,
            observation_queries=None, scale=1.0, seed=0, earlier=prefix,
        )  # fmt: skip
        untouched = torch.ones(len(pages), dtype=torch.bool)
        untouched[prefix.page_ids] = False
        assert torch.equal(pages[untouched].nan_to_num(7.0), before[untouched].nan_to_num(7.0))
        assert int(prefix.pages.sum()) == plan.num_compressed_blocks * 6
        start = 0
        for (layer, head), positions in kept.items():
            candidates = positions + list(range(span.start, span.stop))
            protected = {0, 1, *candidates[-recent:]}
            count = int(prefix.pages[layer, head]) * 4
            ranked = sorted(
                candidates, key=lambda t: (t not in protected, -norms[layer, head, t].item(), t)
            )
            positions[:] = sorted(ranked[:count])
            ids = prefix.page_ids[start : start + count // 4]
            scores = prefix.scores[start * 4 : start * 4 + count]
            start += count // 4
            assert torch.equal(store.read_keys(ids[None], layer)[0], keys[layer, head, positions])
            assert torch.equal(
                store.read_values(ids[None], layer)[0], values[layer, head, positions]
            )
            assert torch.allclose(scores, norms[layer, head, positions])
        done = plan
    assert done.num_prefix_blocks == 10
    assert done.start_blocks == 8
