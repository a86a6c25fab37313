"""Attention with its normaliser: the CPU's kernel against a softmax, the others' signatures."""

import pytest
import torch

from vllm_kvzip.model import capped_attention
from vllm_kvzip.model.fused_attention import attend_with_normaliser


@pytest.mark.parametrize("causal", [False, True])
def test_it_is_softmax_attention(causal):
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(3, 7, 16) for _ in range(3))
    attended, log_normaliser = attend_with_normaliser(queries, keys, values, 0.3, causal=causal)
    logits = queries @ keys.transpose(1, 2) * 0.3
    if causal:
        logits.masked_fill_(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    torch.testing.assert_close(attended, logits.softmax(-1) @ values)
    torch.testing.assert_close(log_normaliser, logits.logsumexp(-1))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 0.7])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rows_at_once", [2, 7])
def test_what_is_added_to_a_softmax(causal, soft_cap, has_sinks, rows_at_once, monkeypatch):
    """Shifted logits, capped ones, and one that has no value."""
    torch.manual_seed(0)
    monkeypatch.setattr(capped_attention, "LOGITS_AT_ONCE", rows_at_once * 3 * 7)
    queries, keys, values = (torch.randn(3, 7, 16) for _ in range(3))
    offsets, sinks = torch.randn(2, 3, 7)
    attended, log_normaliser = attend_with_normaliser(
        queries, keys, values, 0.3, causal=causal, soft_cap=soft_cap, offsets=offsets,
        sink_logits=sinks if has_sinks else None,
    )  # fmt: skip
    logits = (queries @ keys.transpose(1, 2) + offsets[..., None]) * 0.3
    if soft_cap:
        logits = soft_cap * (logits / soft_cap).tanh()
    if causal:
        logits.masked_fill_(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
    whole = logits
    if has_sinks:
        whole = torch.cat([logits, sinks[..., None]], dim=-1)
    torch.testing.assert_close(attended, whole.softmax(-1)[..., :7] @ values)
    torch.testing.assert_close(log_normaliser, whole.logsumexp(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_keys", [7, 40])
def test_the_kernels_for_gpus_are_asked_for_the_same(dtype, num_keys):
    """On torch's device without contents, which runs the operators' own shape rules."""
    queries = torch.empty(3, 40, 64, dtype=dtype, device="meta")
    keys = torch.empty(3, num_keys, 64, dtype=dtype, device="meta")
    attended, log_normaliser = attend_with_normaliser(
        queries, keys, keys, 0.3, causal=num_keys == 40
    )
    assert attended.shape == queries.shape
    assert log_normaliser.shape == (3, 40)
    assert log_normaliser.dtype is torch.float32


@pytest.mark.parametrize("causal", [False, True])
def test_vectors_may_lie_dimension_by_dimension(causal):
    """So lie the keys of a page of vLLM's CPU kernel."""
    keys = torch.randn(2, 16, 11).transpose(1, 2)
    values = torch.randn(2, 11, 16)
    queries = torch.randn(2, 16, 11).transpose(1, 2)
    found = attend_with_normaliser(queries, keys, values, 0.3, causal=causal)
    dense = attend_with_normaliser(
        queries.contiguous(), keys.contiguous(), values, 0.3, causal=causal
    )
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one, other)
