"""Blocks that hold several pages of each head keep what as many small blocks would."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.config import Budget
from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.quantization import choose_quantization
from vllm_kvzip.scoring import create_scorer
from vllm_kvzip.storage.head_pages import HeadPageTable, PagePool
from vllm_kvzip.storage.row_pages import RowPages

N, D, PER_HEAD, BLOCKS = 8, 32, 3, 16
LARGE = CacheGeometry(2, 2, 2, D, N * PER_HEAD, pages_per_head=PER_HEAD)
SMALL = CacheGeometry(2, 2, 2, D, N)
SOURCE, TARGET = [9, 4, 1, 12, 2], [3, 15, 0, 7, 5]
FRACTIONS = [[1.0, 0.1], [0.3, 0.6]]
CHOSEN = choose_quantization(
    page_bytes=2 * N * D * 4, head_dim=D, keys="nf4", values="int8", rotation="auto"
)


def rule_of(mode, ratio, prefill_blocks=None):
    tiers = None
    if mode != "evict":
        split = CHOSEN.split * PER_HEAD
        tiers = TierRule(mode, N * PER_HEAD, CHOSEN.layout.page_tokens, 0.5, split=split)
    return PrefixRule(
        ratio, 0, sink_tokens=2, recent_tokens=2, block_size=N * PER_HEAD, tiers=tiers,
        pages_per_head=PER_HEAD, prefill_blocks=prefill_blocks,
    )  # fmt: skip


def in_small_blocks(plan):
    """The same plan over blocks of one page a head."""
    names = ("num_prefix", "num_compressed", "num_quantized", "start", "held")
    counts = {f"{name}_blocks": PER_HEAD * getattr(plan, f"{name}_blocks") for name in names}
    return replace(plan, pages_per_head=1, **counts)


def small_blocks(blocks):
    return [PER_HEAD * block + part for block in blocks for part in range(PER_HEAD)]


class Side:
    """A pool whose blocks have one size, and what compresses prompts in it."""

    def __init__(self, geometry, budget, rule):
        self.pool = PagePool(
            BLOCKS * PER_HEAD // geometry.pages_per_head, 2, 2,
            pages_per_head=geometry.pages_per_head,
        )  # fmt: skip
        self.store = RowPages(torch.zeros(BLOCKS * PER_HEAD * 4, 2 * N * D), N, D, CHOSEN)
        self.press = Compressor(
            geometry=geometry, pool=self.pool, store=self.store, rule=rule,
            scorer=create_scorer("knorm"), budget=budget, head_importance=FRACTIONS,
            head_fractions=lambda ratio: [[ratio * f for f in row] for row in FRACTIONS],
        )  # fmt: skip

    def write(self, blocks, halves):
        ids = self.pool.page_ids(torch.tensor(blocks)).flatten(0, 1)
        for view, half in zip(self.store.views(), halves, strict=True):
            view[ids] = half.reshape(4, -1, N, D)

    def compress(self, source, target, plan, earlier=None):
        prefix, _ = self.press.compress(
            source_blocks=source, target_blocks=target, plan=plan, observation_queries=None,
            scale=1.0, seed=0, earlier=earlier,
        )  # fmt: skip
        return prefix

    def held(self, prefix):
        """Numbers of the first tier and bytes of the second one, in the order of the heads."""
        found = [view[prefix.page_ids] for view in self.store.views()]
        if prefix.quantized is not None:
            found.append(self.store._quantized[prefix.quantized.page_ids])
        return found


def assert_alike(large, small, prefixes):
    for one, other in zip(prefixes[0].tiers, prefixes[1].tiers, strict=True):
        assert torch.equal(one.pages, other.pages)
    for one, other in zip(large.held(prefixes[0]), small.held(prefixes[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("budget", "mode", "ratio"),
    [
        *((budget, "evict", 0.4) for budget in get_args(Budget)),
        ("adaptive", "mixed", 0.5),
        ("profile", "mixed", 0.5),
        ("uniform", "quantize", 0.6),
        ("retrieval", "quantize", 0.6),
    ],
)
def test_what_is_kept_is_the_same(budget, mode, ratio):
    rule = rule_of(mode, ratio)
    plan = rule.plan(len(SOURCE) * N * PER_HEAD)
    large, small = Side(LARGE, budget, rule), Side(SMALL, budget, rule)
    halves = torch.randn(2, 4, len(SOURCE) * N * PER_HEAD, D)
    halves[0] *= torch.tensor([1.0, 1.3, 1.2, 0.9])[:, None, None]  # heads need unlike numbers
    large.write(SOURCE, halves)
    small.write(small_blocks(SOURCE), halves)
    target = TARGET[: plan.num_compressed_blocks]
    prefixes = (
        large.compress(SOURCE, target, plan),
        small.compress(small_blocks(SOURCE), small_blocks(target), in_small_blocks(plan)),
    )
    assert_alike(large, small, prefixes)
    full, *quantized = plan.tiers
    assert int(prefixes[0].pages.sum()) == full.num_blocks * LARGE.pages_per_block
    if mode == "evict":
        assert len(set(prefixes[0].pages.flatten().tolist())) > 1 or budget == "uniform"
    for tier in quantized:
        assert int(prefixes[0].quantized.pages.sum()) == tier.num_pages * LARGE.num_heads


@pytest.mark.parametrize("budget", ["adaptive", "profile"])
def test_what_was_kept_before_competes_in_the_same_way(budget):
    rule = rule_of("evict", 1.0, prefill_blocks=2)
    first = rule.next_plan(10 * N * PER_HEAD)
    second = rule.next_plan(10 * N * PER_HEAD, done=first)
    large, small = Side(LARGE, budget, rule), Side(SMALL, budget, rule)
    found = []
    for side, convert, change in (
        (large, list, lambda plan: plan),
        (small, small_blocks, in_small_blocks),
    ):
        torch.manual_seed(1)
        prefix, start = None, 0
        for plan, target in ((first, TARGET[:2]), (second, TARGET[2:4])):
            source = [block for block in range(8, 16) if block not in TARGET]
            source = source[: plan.num_prefix_blocks - start]
            side.write(convert(source), torch.randn(2, 4, len(source) * N * PER_HEAD, D))
            prefix = side.compress(convert(source), convert(target), change(plan), prefix)
            start = plan.num_prefix_blocks
        found.append(prefix)
    assert_alike(large, small, found)
    assert torch.equal(found[0].scores, found[1].scores)


@given(st.integers(2, 60), st.floats(0.05, 1), st.integers(0, 40), st.integers(0, 40))
def test_every_head_has_pages_for_its_protected_tokens(num_blocks, ratio, sinks, recent):
    rule = replace(rule_of("evict", ratio), sink_tokens=sinks, recent_tokens=recent)
    plan = rule.plan(num_blocks * N * PER_HEAD)
    if plan is None:
        return
    assert plan.min_pages_per_head * N >= plan.num_protected_tokens
    assert plan.min_pages_per_head <= plan.num_compressed_blocks * PER_HEAD
    assert plan.tiers[0].page_tokens == N
    assert plan.full_tokens == plan.num_compressed_blocks * N * PER_HEAD


def test_tables_go_on_with_the_pages_of_whole_blocks():
    rule = rule_of("evict", 0.4)
    side = Side(LARGE, "adaptive", rule)
    plan = rule.plan(len(SOURCE) * N * PER_HEAD)
    side.write(SOURCE, torch.randn(2, 4, len(SOURCE) * N * PER_HEAD, D))
    prefix = side.compress(SOURCE, TARGET[: plan.num_compressed_blocks], plan)
    table = HeadPageTable.build([prefix], side.pool)
    table.append_tails(torch.tensor([0]), torch.tensor([[10]]))
    table.append_tails(torch.tensor([0]), torch.tensor([[6, 11]]))
    assert table.num_tail_blocks(0) == 3
    tail = side.pool.page_ids(torch.tensor([10, 6, 11]))
    for layer in range(2):
        for head in range(2):
            kept = int(prefix.pages[layer, head])
            row = table.table[layer, head, kept : kept + 3 * PER_HEAD]
            assert torch.equal(row.long(), tail[layer, head])
