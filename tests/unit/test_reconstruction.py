"""KVzip's reconstruction scores against a loop, and its chunks."""

import math

import pytest
import torch
from shifted_logits import rank_correlation, shifted_case

from vllm_kvzip.model.fused_attention import attend_with_normaliser
from vllm_kvzip.planning.reconstruction import (
    iter_chunks,
    pair_fractions,
    reconstruction_scores,
    retrieval_fractions,
    scores_from_normaliser,
)


def test_chunks_cover_the_context_and_link_to_each_other():
    context = list(range(100, 125))
    chunks = list(iter_chunks(context, 10, [1, 2], [3]))
    assert [(c.start, c.end) for c in chunks] == [(0, 10), (10, 20), (20, 25)]
    assert chunks[0].input_ids == [1, 2, *context[:10]]
    assert chunks[1].input_ids == [3, *context[2:10], *context[10:20]]
    assert chunks[2].input_ids == [3, *context[12:20], *context[20:25]]


def test_scores_are_the_largest_attention_of_any_query_of_the_group():
    torch.manual_seed(0)
    num_queries, heads, group, dim, sinks, chunk = 5, 2, 3, 4, 2, 6
    queries = torch.randn(num_queries, heads, group, dim)
    sink_keys, chunk_keys, own_keys = (torch.randn(heads, n, dim) for n in (sinks, chunk, 5))
    got = reconstruction_scores(queries, sink_keys, chunk_keys, own_keys, 0.5)
    few = reconstruction_scores(queries, sink_keys, chunk_keys, own_keys, 0.5, query_rows=2)
    torch.testing.assert_close(few, got)
    for head in range(heads):
        best = [0.0] * chunk
        for row in range(num_queries):
            for member in range(group):
                keys = [*sink_keys[head], *chunk_keys[head], *own_keys[head, : row + 1]]
                weights = [math.exp(0.5 * float(queries[row, head, member] @ key)) for key in keys]
                for index in range(chunk):
                    best[index] = max(best[index], weights[sinks + index] / sum(weights))
        assert got[head].tolist() == pytest.approx(best, rel=1e-4)


def test_scores_follow_from_the_normaliser():
    torch.manual_seed(1)
    heads, group, rows, chunk, dim = 2, 3, 5, 7, 4
    queries, own = torch.randn(rows, heads, group, dim), torch.randn(heads, rows, dim)
    sinks, keys = torch.randn(heads, 2, dim), torch.randn(heads, chunk, dim)
    wanted = reconstruction_scores(queries, sinks, keys, own, 0.5)
    by_head = queries.permute(1, 2, 0, 3)  # [H, G, R, D]
    logits = by_head @ torch.cat([sinks, keys, own], dim=1).transpose(1, 2)[:, None] * 0.5
    future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    logits[..., 2 + chunk :].masked_fill_(future, float("-inf"))
    normaliser = logits.logsumexp(-1).flatten(1)
    got = scores_from_normaliser(by_head.flatten(1, 2), keys, normaliser, 0.5, query_rows=4)
    torch.testing.assert_close(got, wanted)


def test_scores_of_capped_logits():
    torch.manual_seed(2)
    queries, keys, others = torch.randn(2, 9, 16), torch.randn(2, 12, 16), torch.randn(2, 5, 16)
    logits = 0.8 * (queries @ torch.cat([keys, others], dim=1).transpose(1, 2) / 0.8).tanh()
    found = scores_from_normaliser(queries, keys, logits.logsumexp(-1), 1.0, 0.8, query_rows=4)
    torch.testing.assert_close(found, logits.softmax(-1)[..., :12].amax(1))


def test_retrieval_fractions_fill_heads_in_order_of_importance():
    importance = torch.tensor([[0.1, 0.9], [0.5, 0.7]])
    assert retrieval_fractions(importance, 0.625).tolist() == [[0.0, 1.0], [0.5, 1.0]]
    assert retrieval_fractions(importance, 1.0).tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_pair_fractions_follow_one_global_ranking():
    scores = torch.tensor([[[0.9, 0.8], [0.1, 0.2]], [[0.7, 0.3], [0.0, 0.05]]])
    assert pair_fractions(scores, 0.375).tolist() == [[1.0, 0.0], [0.5, 0.0]]
    assert pair_fractions(scores, 1.0).mean() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_large_logits_rank_as_well_as_small_ones(dtype):
    """What all logits have in common says nothing, and is lost before they are rounded."""
    queries, keys, exact, exact_normaliser = shifted_case(dtype)
    scale = queries.shape[2] ** -0.5
    _, normaliser = attend_with_normaliser(queries, keys, keys, scale, causal=False)
    torch.testing.assert_close(normaliser.double(), exact_normaliser, rtol=0, atol=2e-3)
    found = scores_from_normaliser(queries, keys, normaliser, scale)
    assert rank_correlation(found, exact) > 0.98
    torch.testing.assert_close(found.double(), exact, rtol=0.02, atol=0)
