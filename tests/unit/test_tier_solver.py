"""The tier solver: bytes are kept to, and no other split of them is worth more."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvzip.budgeting.tier_solver import solve_tiers


def worth(scores, full, kept, loss):
    """Of the best pairs as they are, the next ones quantized."""
    ranked = scores.flatten().sort(descending=True).values.double()
    return float(ranked[:full].sum() + (1 - loss) * ranked[full:kept].sum())


@given(
    st.integers(0, 10**6),
    st.floats(0.02, 1.0),
    st.sampled_from([0.25, 0.5, 0.27]),
    st.sampled_from([0.05, 0.1, 0.4]),
)
def test_no_other_split_of_the_bytes_is_worth_more(seed, ratio, token_bytes, loss):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(2, 2, 8, generator=generator) ** 6
    full, kept = solve_tiers(scores, ratio, token_bytes, loss)
    num_full, num_kept = (round(float(share.sum()) * 8) for share in (full, kept))
    assert 0 <= num_full <= num_kept <= 32
    held = num_full + (num_kept - num_full) * token_bytes
    assert held <= ratio * 32 + 1 or num_kept == 1
    best = max(
        worth(scores, f, k, loss)
        for f, k in itertools.product(range(33), repeat=2)
        if f <= k and f + (k - f) * token_bytes <= ratio * 32 + 1e-9
    )
    last = float(scores.max())  # pairs are whole: one of them may be missing at either threshold
    assert worth(scores, num_full, num_kept, loss) >= best - 2 * last


def test_each_heads_share_is_of_its_own_pairs():
    scores = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]]])
    full, kept = solve_tiers(scores, 6 * 0.25 / 8, token_bytes=0.25, loss=0.1)
    assert kept.tolist() == [[1.0, 0.5]]
    assert full.tolist() == [[0.0, 0.0]]


def test_bytes_that_are_over_make_pairs_whole():
    full, kept = solve_tiers(1 + torch.rand(2, 2, 100), 0.625, token_bytes=0.25, loss=0.1)
    assert (kept == 1).all()
    assert float(full.mean()) == pytest.approx(0.5)
    full, kept = solve_tiers(torch.rand(2, 2, 100), 1.0, token_bytes=0.25, loss=0.1)
    assert (full == 1).all()


def test_a_great_loss_leaves_more_as_it_is():
    scores = torch.rand(2, 2, 100, generator=torch.Generator().manual_seed(0)) ** 8
    shares = [float(solve_tiers(scores, 0.2, 0.25, loss)[0].mean()) for loss in (0.02, 0.2, 0.6)]
    assert shares[0] < shares[1] < shares[2]
