"""Layers of a draft model lie in the blocks of the compressed ones, and keep every KV pair."""

from dataclasses import replace
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvzip.budgeting.dense_layers import with_dense_layers
from vllm_kvzip.core import CacheGeometry, KeepPlan
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.scoring import create_scorer
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.storage.page_store import PackedPages, PageCodec

N, HEADS, DIM, BLOCKS = 4, 2, 8, 64
TIERS = (None, TierRule("quantize", 16, 30), TierRule("mixed", 16, 30, full_share=0.5))


@settings(deadline=None)
@given(
    st.floats(0.01, 1.0),
    st.integers(1, 2000),
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from(TIERS),
)
def test_a_plan_has_room_for_what_every_layer_keeps(ratio, num_tokens, own, drafts, asked, tiers):
    stock = PrefixRule(ratio, 0, sink_tokens=4, recent_tokens=8, block_size=16, tiers=tiers)
    rule = replace(stock, num_layers=own + drafts, num_dense_layers=drafts)
    options = RequestOptions(keep_ratio=ratio / 2 if asked else None)
    plan, alone = rule.plan(num_tokens, options), stock.plan(num_tokens, options)
    if plan is None:
        if alone is not None:  # what is saved would not free a block
            assert rule.skip_reason(num_tokens, options) == "nothing_to_free"
        return
    assert plan.tiers == alone.tiers
    kept = alone.num_compressed_blocks
    assert (plan.share, plan.full_tokens) == (alone.share, alone.full_tokens)
    needed = own * kept + drafts * plan.num_prefix_blocks
    assert plan.num_compressed_blocks == max(kept, ceil(needed / (own + drafts)))
    if not asked:
        assert plan.num_compressed_blocks <= rule.max_compressed_blocks(num_tokens)


def test_a_draft_has_no_quantized_page():
    keep = KeepPlan(torch.arange(30).view(3, 10), torch.tensor([[1, 0], [0, 2]]))
    with_draft = with_dense_layers(keep, num_layers=1, num_pages=0, page_tokens=10)
    assert torch.equal(with_draft.positions, keep.positions)
    assert with_draft.pages.tolist() == [[1, 0], [0, 2], [0, 0]]


@pytest.mark.parametrize(("budget", "keep_ratio"), [("adaptive", 0.3), ("uniform", 0.5)])
@pytest.mark.parametrize("drafts", [1, 3])
def test_drafts_keep_everything_and_the_others_what_they_would_keep_alone(
    budget, keep_ratio, drafts
):
    torch.manual_seed(1)
    own, source = 3, [9, 4, 17, 30, 2, 8, 41, 22]
    layers = own + drafts
    codec = PageCodec.identity(N, DIM)
    keys, values = torch.randn(2, layers, HEADS, len(source) * N, DIM)
    kept = {}
    for dense in (drafts, 0):
        shape = CacheGeometry(own + dense, HEADS, 2, DIM, N)
        pool = PagePool(BLOCKS, own + dense, HEADS)
        pages = torch.full((BLOCKS * HEADS * (own + dense), 2 * N * DIM), float("nan"))
        store = PackedPages(pages, codec, N, DIM)
        ids = pool.page_ids(torch.tensor(source))
        for layer in range(own + dense):
            store.write(
                ids[layer].flatten(),
                keys[layer].reshape(-1, DIM),
                values[layer].reshape(-1, DIM),
            )
        rule = PrefixRule(keep_ratio, 0, 2, 2, N, num_layers=own + dense, num_dense_layers=dense)
        plan = rule.plan(33)
        targets = [50, 12, 33, 60, 1, 5, 7, 13][: plan.num_compressed_blocks]
        press = Compressor(
            geometry=shape, pool=pool, store=store, rule=rule, scorer=create_scorer("keydiff"),
            budget=budget, num_dense_layers=dense,
        )  # fmt: skip
        prefix, _ = press.compress(
            source_blocks=source, target_blocks=targets, plan=plan,
            observation_queries=None, scale=1.0, seed=0,
        )  # fmt: skip
        assert set(prefix.page_ids.tolist()) <= set(
            pool.page_ids(torch.tensor(targets)).flatten().tolist()
        )
        assert len(set(prefix.page_ids.tolist())) == len(prefix.page_ids) == int(prefix.pages.sum())
        starts = prefix.offsets.tolist()
        kept[dense] = [
            store.read_keys(prefix.page_ids[None, starts[head] : starts[head + 1]], 0)[0]
            for head in range(shape.num_heads)
        ]
    for with_drafts, alone in zip(kept[drafts], kept[0], strict=False):
        assert torch.equal(with_drafts, alone)
    dense_keys = keys[own:].flatten(0, 1)
    for found, wanted in zip(kept[drafts][own * HEADS :], dense_keys, strict=True):
        assert torch.equal(found, wanted)
