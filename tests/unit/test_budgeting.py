"""Budgets: the total is exact, floors hold, and the better head gets more."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.budgeting.budgets import (
    allocate_adaptive,
    allocate_from_fractions,
    allocate_remaining,
    allocate_uniform,
)


def ranked(scores):
    return scores.sort(dim=-1, descending=True).values


@st.composite
def totals(draw):
    num_layers, num_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    max_pages = draw(st.integers(1, 12))
    min_pages = draw(st.integers(1, max_pages))
    heads = num_layers * num_heads
    total = draw(st.integers(heads * min_pages, heads * max_pages))
    return num_layers, num_heads, min_pages, max_pages, total


@given(totals(), st.integers(0, 10**6))
def test_adaptive_is_the_global_top_k_above_the_floor(case, seed):
    num_layers, num_heads, min_pages, max_pages, total = case
    block_size = 4
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_layers, num_heads, max_pages * block_size, generator=generator)
    pages = allocate_adaptive(ranked(scores), total, block_size, min_pages)
    assert int(pages.sum()) == total
    assert int(pages.min()) >= min_pages
    assert int(pages.max()) <= max_pages
    candidates = []
    for layer in range(num_layers):
        for head in range(num_heads):
            own = sorted(scores[layer, head].tolist(), reverse=True)
            for page in range(min_pages, max_pages):
                mean = sum(own[page * block_size : (page + 1) * block_size]) / block_size
                candidates.append((mean, layer, head))
    expected = torch.full_like(pages, min_pages)
    best = sorted(candidates, reverse=True)[: total - num_layers * num_heads * min_pages]
    for _, layer, head in best:
        expected[layer, head] += 1
    assert torch.equal(pages, expected)


def test_adaptive_moves_pages_across_layers_and_per_layer_does_not():
    scores = torch.rand(2, 2, 64)
    scores[1] += 10
    everywhere = allocate_adaptive(ranked(scores), 8, 8, 1)
    assert everywhere.sum(dim=1).tolist() == [2, 6]
    inside = allocate_adaptive(ranked(scores), 8, 8, 1, per_layer=True)
    assert inside.sum(dim=1).tolist() == [4, 4]


@given(totals(), st.integers(0, 10**6))
def test_fractions_give_the_exact_total_within_bounds(case, seed):
    num_layers, num_heads, min_pages, max_pages, total = case
    generator = torch.Generator().manual_seed(seed)
    fractions = torch.rand(num_layers, num_heads, generator=generator)
    importance = torch.rand(num_layers, num_heads, generator=generator)
    pages = allocate_from_fractions(fractions, importance, total, min_pages, max_pages)
    assert int(pages.sum()) == total
    assert int(pages.min()) >= min_pages
    assert int(pages.max()) <= max_pages
    wanted = (fractions.double() * max_pages).round().clamp(min_pages, max_pages)
    change = (pages - wanted).flatten()[importance.flatten().argsort()]
    if int(change.sum()) < 0:  # the least important pay, each down to its floor before the next
        payers = change.nonzero().flatten()
        assert payers.max() < len(change)
        floors = pages.flatten()[importance.flatten().argsort()][: int(payers.max())]
        assert (floors == min_pages).all()


def test_fractions_that_fit_are_taken_as_they_are():
    fractions = torch.tensor([[1.0, 0.25], [0.25, 0.5]])
    pages = allocate_from_fractions(fractions, fractions, 16, 1, 8)
    assert pages.tolist() == [[8, 2], [2, 4]]


def test_retrieval_heads_stay_whole_while_others_pay_for_the_floors():
    fractions = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    importance = torch.tensor([[0.9, 0.3], [0.8, 0.1]])
    pages = allocate_from_fractions(fractions, importance, 24, 1, 8)
    assert pages.tolist() == [[8, 7], [8, 1]]
    pages = allocate_from_fractions(fractions, importance, 26, 1, 8)
    assert pages.tolist() == [[8, 8], [8, 2]]


def test_uniform():
    assert allocate_uniform(24, 2, 3).tolist() == [[4, 4, 4], [4, 4, 4]]
    with pytest.raises(ValueError, match="25 pages do not divide"):
        allocate_uniform(25, 2, 3)


@pytest.mark.parametrize("total", [3, 33])
def test_impossible_totals_are_refused(total):
    with pytest.raises(ValueError, match="the heads hold 4 to 32"):
        allocate_from_fractions(torch.ones(2, 2), torch.ones(2, 2), total, 1, 8)
    with pytest.raises(ValueError, match="the heads hold 4 to 32"):
        allocate_adaptive(torch.rand(2, 2, 32), total, 4, 1)


@given(totals(), st.integers(0, 10**6), st.data())
def test_the_pages_of_a_later_tier_are_the_best_of_what_is_left(case, seed, data):
    num_layers, num_heads, min_pages, max_pages, total = case
    page_tokens, rest = 4, data.draw(st.integers(0, 3))
    num_tokens = max_pages * page_tokens - rest
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_layers, num_heads, num_tokens, generator=generator)
    taken = torch.randint(0, num_tokens + 1, (num_layers, num_heads), generator=generator)
    floors = torch.randint(0, min_pages + 1, (num_layers, num_heads), generator=generator)
    pages = allocate_remaining(ranked(scores), taken, total, page_tokens, floors)
    assert int(pages.sum()) == total
    assert (pages >= floors).all()
    best, found = [], 0.0
    for layer in range(num_layers):
        for head in range(num_heads):
            left = scores[layer, head].sort(descending=True).values[taken[layer, head] :]
            own = [
                float(left[first : first + page_tokens].sum())
                for first in range(0, max_pages * page_tokens, page_tokens)
            ]
            found += sum(own[: int(pages[layer, head])])
            floor = int(floors[layer, head])
            best += [value + 1e6 * (page < floor) for page, value in enumerate(own)]
    expected = sum(sorted(best)[-total:]) - 1e6 * int(floors.sum())
    assert found == pytest.approx(expected, abs=1e-3)


def test_floors_beyond_the_total_are_refused():
    with pytest.raises(ValueError, match="3 pages asked for, but the heads hold 4 to 8"):
        allocate_remaining(
            torch.rand(1, 2, 16), torch.zeros(1, 2, dtype=torch.int64), 3, 4, torch.tensor([[2, 2]])
        )
    with pytest.raises(ValueError, match="3 pages asked for, but the heads hold 4 to 16"):
        shares = torch.ones(1, 2)
        allocate_from_fractions(shares, shares, 3, torch.tensor([[3, 1]]), 8)


def test_each_head_has_its_own_floor():
    importance = torch.tensor([[0.9, 0.1], [0.5, 0.2]])
    floors = torch.tensor([[0, 3], [0, 1]])
    pages = allocate_from_fractions(torch.full((2, 2), 0.5), importance, 8, floors, 8)
    assert pages.tolist() == [[4, 3], [0, 1]]
