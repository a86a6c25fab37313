"""Compression into two tiers: each head's best pairs as they are, the next ones quantized."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.budgeting.allocation import PageAllocator
from vllm_kvzip.budgeting.selection import rank
from vllm_kvzip.config import Budget
from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.quantization import choose_quantization, rotate_back, unpack_pages
from vllm_kvzip.scoring import create_scorer
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.storage.page_store import PackedPages, PageCodec
from vllm_kvzip.storage.row_pages import RowPages
from vllm_kvzip.storage.tiered_attention import quantized_tokens

N, D, BLOCKS = 8, 32, 40
GEOMETRY = CacheGeometry(num_layers=2, num_kv_heads=2, group_size=2, head_dim=D, block_size=N)
POOL = PagePool(num_blocks=BLOCKS, num_layers=2, num_kv_heads=2)
SOURCE = [9, 4, 17, 30, 2, 8, 41 - 10, 22, 12, 5]
TARGET = [39, 0, 33, 1, 20, 19, 18, 3, 7, 6]
FRACTIONS = [[1.0, 0.1], [0.3, 0.6]]


def quantization(values="int8"):
    return choose_quantization(
        page_bytes=2 * N * D * 4, head_dim=D, keys="nf4", values=values, rotation="auto"
    )


def rows_of(pages, chosen):
    return RowPages(pages, N, D, chosen)


def packed_of(pages, chosen):
    codec = PageCodec(torch.randperm(N * D), torch.randperm(N * D))
    return PackedPages(pages, codec, N, D, chosen)


def write_prompt(store, pages, keys, values):
    """Keys and values ``[L, H, T, D]`` into the source blocks."""
    ids = POOL.page_ids(torch.tensor(SOURCE))
    for layer in range(2):
        flat = ids[layer].flatten()
        own = keys[layer].reshape(-1, D), values[layer].reshape(-1, D)
        if isinstance(store, PackedPages):
            store.write(flat, *own)
        else:
            for view, half in zip(store.views(), own, strict=True):
                view[flat] = half.view(-1, N, D)


def compress(make_store, budget, rule, values="int8", scorer="knorm"):
    torch.manual_seed(3)
    chosen = quantization(values)
    pages = torch.full((BLOCKS * 4, 2 * N * D), float("nan"))
    keys, vals = torch.randn(2, 2, 2, len(SOURCE) * N, D)
    store = make_store(pages, chosen)
    write_prompt(store, pages, keys, vals)
    press = Compressor(
        geometry=GEOMETRY, pool=POOL, store=store, rule=rule, scorer=create_scorer(scorer),
        budget=budget, head_fractions=lambda ratio: [[ratio * f for f in r] for r in FRACTIONS],
        head_importance=FRACTIONS,
    )  # fmt: skip
    plan = rule.plan(len(SOURCE) * N + 3)
    before = pages.clone()
    prefix, stages = press.compress(
        source_blocks=SOURCE, target_blocks=TARGET[: plan.num_compressed_blocks], plan=plan,
        observation_queries=None, scale=1.0, seed=0,
    )  # fmt: skip
    touched = torch.cat([prefix.page_ids, prefix.quantized.page_ids // plan.quantized_split])
    others = torch.ones(len(pages), dtype=torch.bool)
    others[touched] = False
    assert torch.equal(pages[others].view(torch.int32), before[others].view(torch.int32))
    assert set(stages.seconds()) == {"score", "select", "compact", "quantize"}
    return plan, prefix, store, pages, keys, vals, chosen


def rule_of(mode, ratio, share=0.6, by_bytes=False, values="int8"):
    chosen = quantization(values)
    tiers = TierRule(mode, N, chosen.layout.page_tokens, share, by_bytes, split=chosen.split)
    return PrefixRule(ratio, 0, sink_tokens=2, recent_tokens=2, block_size=N, tiers=tiers)


@pytest.mark.parametrize("make_store", [packed_of, rows_of])
@pytest.mark.parametrize("budget", get_args(Budget))
@pytest.mark.parametrize(("mode", "ratio"), [("mixed", 0.6), ("quantize", 0.6), ("quantize", 1.0)])
def test_what_lies_in_the_pages_of_either_tier(make_store, budget, mode, ratio):
    plan, prefix, store, pages, keys, values, chosen = compress(
        make_store, budget, rule_of(mode, ratio)
    )
    page_tokens = chosen.layout.page_tokens
    assert int(prefix.pages.sum()) == plan.num_full_blocks * 4
    assert int(prefix.quantized.pages.sum()) == plan.num_quantized_pages * 4
    assert (plan.num_full_blocks > 0) == (mode == "mixed")
    counts = quantized_tokens(prefix, plan.boundary_tokens, N, page_tokens)
    first, second = prefix.offsets, prefix.offsets_of(1)
    before = len(prefix.page_ids) * plan.quantized_split
    assert int(second[0]) == before
    assert int(second[-1]) == before + len(prefix.quantized.page_ids)
    for head in range(4):
        of_keys, of_values = keys[head // 2, head % 2], values[head // 2, head % 2]
        norms = of_keys.norm(dim=-1)
        norms[:2] = norms[-2:] = -1.0  # sinks and recent tokens
        ranked = norms.argsort(stable=True)
        ids = prefix.page_ids[first[head] : first[head + 1]]
        num_full = len(ids) * N
        best = ranked[:num_full].sort().values
        if len(ids):
            assert torch.equal(store.read_keys(ids[None], head // 2)[0], of_keys[best])
            assert torch.equal(store.read_values(ids[None], head // 2)[0], of_values[best])
        ids = prefix.quantized.page_ids[second[head] - before : second[head + 1] - before]
        count = int(counts[head // 2, head % 2])
        following = ranked[num_full : num_full + count].sort().values
        if not len(ids):
            continue
        found = list(unpack_pages(chosen.pages_of(pages)[ids], chosen.layout))
        for decoded, original, error in zip(found, (of_keys, of_values), (0.15, 0.02), strict=True):
            if count:
                back = rotate_back(decoded[:count])
                if original is of_keys:
                    back = prefix.key_transform.at(head // 2).at(head % 2).undo(back)
                assert (back - original[following]).norm() < error * original[following].norm()
            assert (decoded[count:].abs() < 1e-6).all()


@pytest.mark.parametrize("budget", get_args(Budget))
@given(st.integers(2, 40), st.floats(0.05, 1), st.floats(0.05, 0.95), st.booleans(), st.data())
def test_every_head_has_its_protected_tokens_in_either_tier(
    budget, num_blocks, ratio, share, by_bytes, data
):
    """Even a head of which scores and profile want nothing at all."""
    sinks, recent = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 30))
    tiers = TierRule("mixed", N, 40, share, by_bytes)
    rule = PrefixRule(ratio, 0, sinks, recent, block_size=N, tiers=tiers)
    plan = rule.plan(num_blocks * N)
    if plan is None or not plan.num_quantized_blocks:
        return
    shares = [[1.0, 0.0], [ratio, 0.0]]
    allocator = PageAllocator(GEOMETRY, budget, lambda _: shares, shares)
    scores = torch.rand(2, 2, num_blocks * N)
    scores[:, 1] = 0
    ranking = rank(scores, 0, 0)
    full = allocator.full(ranking, plan)
    quantized = allocator.quantized(ranking, full * N, plan)
    assert int(full.sum()) == plan.num_full_blocks * 4
    assert int(quantized.sum()) == plan.num_quantized_blocks * 4
    protected = max(1, plan.num_protected_tokens)
    assert (full * N + quantized * 40 >= protected).all()


def test_an_unimportant_head_needs_no_ordinary_page():
    tiers = TierRule("mixed", N, 40, full_share=0.5)
    rule = PrefixRule(0.9, 0, sink_tokens=2, recent_tokens=2, block_size=N, tiers=tiers)
    shares = [[1.0, 0.0], [1.0, 0.0]]
    allocator = PageAllocator(GEOMETRY, "profile", lambda _: shares, shares)
    plan = rule.plan(80)
    full = allocator.full(rank(torch.zeros(2, 2, 80), 0, 0), plan)
    assert full[:, 1].tolist() == [0, 0]


@pytest.mark.parametrize("budget", ["adaptive", "uniform", "profile"])
def test_both_stores_write_the_same_bytes(budget):
    written = []
    for make_store in (packed_of, rows_of):
        _, prefix, _, pages, *_ = compress(
            make_store, budget, rule_of("mixed", 0.6, values="nf4"), "nf4"
        )
        written.append(quantization("nf4").pages_of(pages)[prefix.quantized.page_ids])
    used = quantization("nf4").layout.used_bytes
    same = (written[0][:, :used] == written[1][:, :used]).float().mean()
    assert same > 0.999  # gaps between regions are left as they were


def test_heads_that_shall_keep_everything_miss_no_token():
    """Whole heads by importance, as profiles ask for: the least important ones pay."""
    rule = rule_of("mixed", 0.5, share=0.6, values="nf4")
    as_they_are, kept = [[0.2, 0.0], [0.1, 0.1]], [[1.0, 1.0], [0.6, 0.6]]
    press = Compressor(
        geometry=GEOMETRY, pool=POOL, store=rows_of(torch.zeros(160, 512), quantization("nf4")),
        rule=rule, scorer=create_scorer("knorm"), budget="profile",
        head_fractions=lambda _: kept, head_importance=[[0.9, 0.8], [0.2, 0.1]],
        tier_fractions=lambda _: (as_they_are, kept),
    )  # fmt: skip
    plan = rule.plan(80)
    assert (plan.num_full_blocks, plan.num_quantized_blocks) == (1, 1)
    write_prompt(press._store, None, *torch.randn(2, 2, 2, 80, D))
    prefix, _ = press.compress(
        source_blocks=SOURCE, target_blocks=TARGET[: plan.num_compressed_blocks], plan=plan,
        observation_queries=None, scale=1.0, seed=0,
    )  # fmt: skip
    held = prefix.pages * N + prefix.quantized.pages * plan.quantized_page_tokens
    assert (held[0] >= 80).all()


def test_all_bytes_keep_everything_as_it_is():
    rule = rule_of("mixed", 1.0, by_bytes=True)
    assert rule.plan(len(SOURCE) * N).num_quantized_blocks == 0


def test_a_score_that_is_no_number_is_refused():
    class Broken(type(create_scorer("knorm"))):
        def score_layer(self, inputs):
            return super().score_layer(inputs) * float("nan")

    with pytest.raises(ValueError, match="NaN"):
        press = Compressor(
            geometry=GEOMETRY, pool=POOL, store=rows_of(torch.zeros(160, 512), quantization()),
            rule=rule_of("mixed", 0.6), scorer=Broken(None), budget="adaptive",
        )  # fmt: skip
        plan = rule_of("mixed", 0.6).plan(80)
        press.compress(
            source_blocks=SOURCE, target_blocks=TARGET[: plan.num_compressed_blocks], plan=plan,
            observation_queries=None, scale=1.0, seed=0,
        )  # fmt: skip


def test_compaction_never_quantizes_into_its_source():
    store = packed_of(torch.zeros(160, 512), quantization())
    sources = POOL.page_ids(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="own pages"):
        store.quantize(sources, None, sources[0, 0, :1], None)
