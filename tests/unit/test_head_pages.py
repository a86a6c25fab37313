"""The arithmetic of head pages."""

from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.core import CompressedPrefix, StoredTier
from vllm_kvzip.storage.head_pages import HeadPageTable, PagePool, deal_pages


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 20), st.data())
def test_dealing_gives_each_page_to_one_head(num_layers, num_heads, num_blocks, data):
    pool = PagePool(num_blocks=50, num_layers=num_layers, num_kv_heads=num_heads)
    blocks = data.draw(st.lists(st.integers(0, 49), min_size=num_blocks, max_size=num_blocks,
                                unique=True))  # fmt: skip
    total = num_blocks * num_layers * num_heads
    cuts = sorted(data.draw(st.lists(st.integers(0, total), min_size=num_layers * num_heads - 1,
                                     max_size=num_layers * num_heads - 1)))  # fmt: skip
    pages = torch.tensor([0, *cuts, total]).diff().view(num_layers, num_heads)
    ids = deal_pages(torch.tensor(blocks), int(pages.sum()), pool)
    expected = {
        pool.page_id(layer, block, head)
        for layer in range(num_layers)
        for block in blocks
        for head in range(num_heads)
    }
    assert len(ids) == total
    assert set(ids.tolist()) == expected


def test_skewed_budgets_hold_the_least_possible_number_of_blocks():
    """One layer keeps everything, every other head one page."""
    num_layers, num_heads, prefix_blocks = 4, 4, 32
    pages = torch.ones(num_layers, num_heads, dtype=torch.int64)
    pages[1] = prefix_blocks
    num_blocks = ceil(int(pages.sum()) / (num_layers * num_heads))
    assert num_blocks == 9  # 4 * 32 + 12 pages in blocks of 16; dealing by head would take 32
    pool = PagePool(num_blocks=64, num_layers=num_layers, num_kv_heads=num_heads)
    total = int(pages.sum())
    assert len(deal_pages(torch.arange(num_blocks), total, pool)) == total
    with pytest.raises(ValueError, match="140 head pages asked of 8 blocks"):
        deal_pages(torch.arange(num_blocks - 1), total, pool)


def test_page_ids_need_64_bits_in_elements_only():
    pool = PagePool(num_blocks=200_000, num_layers=80, num_kv_heads=8)
    last = pool.page_id(79, 199_999, 7)
    assert last == 200_000 * 80 * 8 - 1
    assert pool.page_ids(torch.tensor([199_999]))[79, 7, 0] == last


def test_strides_and_offset_of_other_placements():
    pool = PagePool(10, 2, 2, first_page=100, layer_stride=1000, block_stride=20)
    assert pool.page_id(1, 3, 1) == 100 + 1000 + 60 + 1
    assert pool.page_ids(torch.tensor([3]))[1, 1, 0] == pool.page_id(1, 3, 1)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.data())
def test_page_table_lists_compressed_pages_then_the_tail(num_layers, num_heads, num_reqs, data):
    pool = PagePool(num_blocks=500, num_layers=num_layers, num_kv_heads=num_heads)
    prefixes, tails = [], []
    for _ in range(num_reqs):
        counts = data.draw(st.lists(st.integers(1, 6), min_size=num_layers * num_heads,
                                    max_size=num_layers * num_heads))  # fmt: skip
        pages = torch.tensor(counts).view(num_layers, num_heads)
        prefixes.append(
            CompressedPrefix((StoredTier(torch.randint(10**4, (sum(counts),)), pages),))
        )
        tails.append(data.draw(st.lists(st.integers(0, 499), max_size=20)))
    table = HeadPageTable.build(prefixes, pool, spare_columns=2)
    for request, tail in enumerate(tails):
        cut = len(tail) // 2
        for part in (tail[:cut], tail[cut:]):
            if part:
                table.append_tails(torch.tensor([request]), torch.tensor([part]))
        assert table.num_tail_blocks(request) == len(tail)
    for request, (prefix, tail) in enumerate(zip(prefixes, tails, strict=True)):
        start = 0
        for layer in range(num_layers):
            for head in range(num_heads):
                count = int(prefix.pages[layer, head])
                wanted = prefix.page_ids[start : start + count].tolist()
                wanted += [pool.page_id(layer, block, head) for block in tail]
                start += count
                row = request * num_heads + head
                assert table.table[layer, row, : len(wanted)].tolist() == wanted
                assert table.compressed_pages[layer, row] == count


@given(st.integers(1, 2), st.integers(1, 3), st.data())
def test_requests_that_stay_keep_their_rows(num_layers, num_heads, data):
    """A batch in another order, with some gone and some new, equals one that is built afresh."""
    pool = PagePool(num_blocks=500, num_layers=num_layers, num_kv_heads=num_heads)
    count = num_layers * num_heads
    prefixes, tails = [], []
    for _ in range(6):
        counts = data.draw(st.lists(st.integers(1, 9), min_size=count, max_size=count))
        pages = torch.tensor(counts).view(num_layers, num_heads)
        prefixes.append(
            CompressedPrefix((StoredTier(torch.randint(10**4, (sum(counts),)), pages),))
        )
        tails.append(torch.tensor(data.draw(st.lists(st.integers(0, 499), max_size=20))))
    first = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4, unique=True))
    then = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=6, unique=True))

    def build(members, **how):
        return HeadPageTable.build([prefixes[i] for i in members], pool, spare_columns=2, **how)

    def append(table, members, only=range(6)):
        for row, member in enumerate(members):
            if member in only and len(tails[member]):
                table.append_tails(torch.tensor([row]), tails[member][None])

    before = build(first)
    append(before, first)
    stay = {row: first.index(member) for row, member in enumerate(then) if member in first}
    found = build(then, earlier=before, stay=stay)
    append(found, then, set(range(6)) - set(first))
    wanted = build(then)
    append(wanted, then)
    assert torch.equal(found.compressed_pages, wanted.compressed_pages)
    for row, member in enumerate(then):
        assert found.num_tail_blocks(row) == len(tails[member])
        for head in range(num_heads):
            for layer in range(num_layers):
                pair = row * num_heads + head
                end = int(wanted.compressed_pages[layer, pair]) + len(tails[member])
                assert torch.equal(found.table[layer, pair, :end], wanted.table[layer, pair, :end])
