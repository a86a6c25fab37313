"""Compaction, scores and page tables against their plain-torch references, interpreted."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from shifted_logits import rank_correlation, shifted_case

from gpu.kernel_cases import Asked, Shape, make_case
from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.kernels.flat_tables import flatten_tables
from vllm_kvzip.kernels.page_copies import compact_pages
from vllm_kvzip.kernels.reference import (
    column_maximum_reference,
    compact_pages_reference,
    flatten_tables_reference,
)

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter is slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def interleaved(num_pages, page_tokens, head_dim, dtype):
    """Keys and values of a token side by side, as vLLM stores them on CUDA."""
    pages = torch.randn(num_pages, page_tokens, 2 * head_dim).to(dtype)
    return pages, pages.split(head_dim, dim=-1)


@settings(max_examples=30, deadline=None, phases=NO_SHRINKING)
@given(
    num_heads=st.integers(1, 5),
    blocks=st.integers(1, 6),
    page_tokens=st.sampled_from([16, 32, 64, 128]),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    dtype=DTYPES,
    seed=st.integers(0, 999),
)
def test_compaction_moves_bits(num_heads, blocks, page_tokens, head_dim, dtype, seed):
    random = torch.Generator().manual_seed(seed)
    num_pages = num_heads * blocks
    order = torch.randperm(3 * num_pages, generator=random).int()
    sources = order[:num_pages].view(num_heads, blocks)
    kept = torch.randint(0, blocks + 1, (num_heads,), generator=random)
    kept[0] = max(1, int(kept[0]))
    page_heads = torch.arange(num_heads).repeat_interleave(kept).int()
    targets = order[num_pages:][: len(page_heads)]
    positions = torch.cat(
        [
            torch.randperm(blocks * page_tokens, generator=random)[: count * page_tokens].sort()[0]
            for count in kept.tolist()
        ]
    ).int()
    pages, (keys, values) = interleaved(3 * num_pages, page_tokens, head_dim, dtype)
    expected, (expected_keys, expected_values) = pages.clone(), (None, None)
    expected_keys, expected_values = expected.split(head_dim, dim=-1)
    compact_pages_reference(expected_keys, expected_values, sources, positions, page_heads, targets)
    before = pages.clone()
    compact_pages(keys, values, sources, positions, page_heads, targets)
    assert torch.equal(pages.view(torch.uint8), expected.view(torch.uint8))
    assert not torch.equal(pages, before)
    assert torch.equal(pages[sources.long()], before[sources.long()])


@settings(max_examples=30, deadline=None, phases=NO_SHRINKING)
@given(
    num_heads=st.integers(1, 3),
    num_queries=st.integers(1, 150),
    num_keys=st.integers(1, 150),
    head_dim=st.sampled_from([64, 96, 128, 256]),
    dtype=DTYPES,
    soft_cap=st.sampled_from([None, None, 0.5, 30.0]),
    seed=st.integers(0, 999),
)
def test_scores(num_heads, num_queries, num_keys, head_dim, dtype, soft_cap, seed):
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(num_heads, num_queries, head_dim, generator=random).to(dtype)
    keys = torch.randn(num_heads, num_keys + 7, head_dim, generator=random).to(dtype)
    scale = head_dim**-0.5
    logits = torch.bmm(queries.float(), keys.float().transpose(1, 2)) * scale
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    log_normaliser = logits.logsumexp(dim=-1)  # of more keys than are scored
    if seed % 2:  # as torch's fused attention gives it on the CPU
        log_normaliser = log_normaliser.t().contiguous().t()
    scored = keys[:, :num_keys]
    how = (log_normaliser, scale, soft_cap)
    found = column_maximum(queries, scored, *how)
    expected = column_maximum_reference(queries.float(), scored.float(), *how)
    assert found.shape == (num_heads, num_keys)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(expected.argmax(dim=1), found.argmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_of_large_logits(dtype):
    queries, keys, exact, normaliser = shifted_case(dtype)
    found = column_maximum(queries, keys, normaliser.float(), queries.shape[2] ** -0.5)
    assert rank_correlation(found, exact) > 0.98
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=0)


@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
@given(
    shape=st.builds(
        Shape,
        num_layers=st.integers(1, 3),
        num_kv_heads=st.integers(1, 3),
        page_tokens=st.sampled_from([16, 32]),
        pages_per_head=st.sampled_from([1, 3]),
    ),
    ratios=st.lists(st.sampled_from([None, 0.1, 0.5, 1.0]), min_size=1, max_size=4),
    seed=st.integers(0, 999),
)
def test_tables_of_all_layers(shape, ratios, seed):
    batch = [
        Asked((6 + index) * shape.block_tokens + seed % 5 + 1)
        if ratio is None
        else Asked((6 + index) * shape.block_tokens + seed % 5 + 1, 1, 3 + index, ratio)
        for index, ratio in enumerate(ratios)
    ]
    case = make_case(batch, shape, seed=seed)
    width = 5 + int(case.tables.seq_lens.max()) // shape.page_tokens
    pairs = (shape.num_layers, len(batch) * shape.num_kv_heads)
    flat = torch.zeros(*pairs, width, dtype=torch.int32)
    lengths = torch.full(pairs, -1, dtype=torch.int32)
    flatten_tables(case.tables, flat, lengths)
    expected, expected_lengths = flatten_tables_reference(case.tables, width)
    assert torch.equal(flat, expected)
    assert torch.equal(lengths, expected_lengths)
