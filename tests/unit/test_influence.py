"""Influence of KV pairs, against leaving each pair out by hand."""

import itertools

import numpy as np
import pytest
import torch

from vllm_kvzip.head_profiles.influence import influence_scores, log_odds


def by_hand(queries, keys, values, gradients, scale, pairs):
    """Root of the sum of squared products of gradient and change of the output without a pair."""
    num_heads, num_rows = len(keys), queries.shape[1]
    total = torch.zeros(num_heads, keys.shape[1], dtype=torch.double)
    for head, row in itertools.product(range(len(queries)), range(num_rows)):
        kv_head = head // (len(queries) // num_heads)
        seen = keys.shape[1] - num_rows + row + 1
        logits = keys[kv_head, :seen] @ queries[head, row] * scale
        output = logits.softmax(dim=0) @ values[kv_head, :seen]
        for pair in range(min(seen, pairs.stop)):
            rest = logits.clone()
            rest[pair] = float("-inf")
            change = rest.softmax(dim=0) @ values[kv_head, :seen] - output
            total[kv_head, pair] += float(change @ gradients[head, row]) ** 2
    return total.sqrt()[:, pairs]


@pytest.mark.parametrize("query_rows", [1, 2, 5, 64])
@pytest.mark.parametrize("scale", [0.5, 30.0])  # soft, and queries that look at one pair only
def test_it_is_the_change_of_what_a_head_says_without_the_pair(query_rows, scale):
    torch.manual_seed(0)
    queries, gradients = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    keys, values = torch.randn(2, 12, 8), torch.randn(2, 12, 8)
    outputs = torch.empty_like(queries)
    for head, row in itertools.product(range(4), range(5)):
        seen = 12 - 5 + row + 1
        weights = (keys[head // 2, :seen] @ queries[head, row] * scale).softmax(dim=0)
        outputs[head, row] = weights @ values[head // 2, :seen]
    pairs = slice(2, 7)
    got = influence_scores(
        queries, keys, values, outputs, gradients, scale, pairs, query_rows=query_rows
    )
    wanted = by_hand(*(part.double() for part in (queries, keys, values, gradients)), scale, pairs)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)


def test_log_odds_of_a_token_that_is_sure_are_not_infinite():
    logits = torch.tensor([[40.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    got = log_odds(logits, torch.tensor([0, 1]))
    probability = logits[1].softmax(dim=0)[1]
    assert got[0] == pytest.approx(40.0 - np.log(2.0), rel=1e-6)
    assert got[1] == pytest.approx(float((probability / (1 - probability)).log()), rel=1e-5)
