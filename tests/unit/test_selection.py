"""Selection: budgets are met exactly, protected tokens stay, ties go to the earlier token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.budgeting.selection import protect, rank, select, take


def kept(plan, head):
    start = int(plan.pages.flatten()[:head].sum())
    return plan.positions[start:][: int(plan.pages.flatten()[head])].flatten().tolist()


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 8), st.integers(0, 10**6), st.data())
def test_each_head_keeps_its_best_tokens(num_layers, num_heads, num_pages, seed, data):
    block_size = 4
    num_tokens = num_pages * block_size
    count = num_layers * num_heads
    budgets = data.draw(st.lists(st.integers(1, num_pages), min_size=count, max_size=count))
    pages = torch.tensor(budgets).view(num_layers, num_heads)
    sinks, recent = data.draw(st.sampled_from([(0, 0), (1, 0), (0, 2), (2, 2)]))
    scores = torch.randint(
        0, 5, (num_layers, num_heads, num_tokens), generator=torch.Generator().manual_seed(seed)
    ).float()
    plan = select(scores, pages, block_size, sinks, recent)
    for head in range(count):
        layer, inside = divmod(head, num_heads)
        protected = set(range(sinks)) | set(range(num_tokens - recent, num_tokens))
        ranking = sorted(
            range(num_tokens),
            key=lambda t: (t not in protected, -scores[layer, inside, t].item(), t),
        )
        assert kept(plan, head) == sorted(ranking[: budgets[head] * block_size])


def test_keep_everything_is_the_identity():
    plan = select(torch.rand(2, 2, 16), torch.full((2, 2), 4), 4, 1, 1)
    assert plan.positions.flatten().tolist() == list(range(16)) * 4


def test_protected_tokens_do_not_raise_a_heads_worth():
    scores = torch.tensor([[[1.0, 2.0, 3.0, 0.0]]])
    assert protect(scores, 1, 1).tolist() == [[[3.0, 2.0, 3.0, 3.0]]]
    assert scores.tolist() == [[[1.0, 2.0, 3.0, 0.0]]]


def test_nan_and_impossible_budgets_are_refused():
    pages = torch.ones(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="NaN"):
        select(torch.full((1, 1, 8), float("nan")), pages, 4, 0, 0)
    with pytest.raises(ValueError, match="do not fit 5 protected"):
        select(torch.rand(1, 1, 8), pages, 4, 3, 2)
    with pytest.raises(ValueError, match="do not fit"):
        select(torch.rand(1, 1, 8), pages * 3, 4, 0, 0)


@given(st.integers(1, 3), st.integers(1, 8), st.integers(0, 10**6), st.data())
def test_two_tiers_share_each_heads_ranking(num_heads, num_pages, seed, data):
    block_size, page_tokens = 4, 7
    num_tokens = num_pages * block_size
    count = 2 * num_heads
    full = data.draw(st.lists(st.integers(0, num_pages), min_size=count, max_size=count))
    most = -(-num_tokens // page_tokens) + 1  # a page more than there is to fill
    more = data.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))
    scores = torch.randint(
        0, 5, (2, num_heads, num_tokens), generator=torch.Generator().manual_seed(seed)
    ).float()
    ranking = rank(scores, 1, 2)
    pages = torch.tensor(full).view(2, num_heads)
    quantized = torch.tensor(more).view(2, num_heads)
    first = take(ranking, torch.zeros_like(pages), pages, block_size, sum(full))
    second = take(ranking, pages * block_size, quantized, page_tokens, sum(more))
    assert second.positions.shape == (sum(more), page_tokens)
    start = 0
    for head in range(count):
        order = ranking.order.flatten(0, 1)[head].tolist()
        taken = full[head] * block_size
        assert kept(first, head) == sorted(order[:taken])
        found = second.positions[start : start + more[head]].flatten().tolist()
        start += more[head]
        wanted = sorted(order[taken : taken + more[head] * page_tokens])
        assert found == wanted + [-1] * (len(found) - len(wanted))
