"""Batches with quantized pages: every query sees both tiers and its dense tail."""

from types import SimpleNamespace

import pytest
import torch
from tiered_world import BLOCK, DIM, GROUP, HEADS, IMPL, NAMES, TieredWorld
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_kvzip.storage.page_store import PackedPages
from vllm_kvzip.storage.row_pages import RowPages
from vllm_kvzip.vllm_bridge.attention.head_sequence_batches import (
    HeadSequenceBatch,
    HeadSequenceBatcher,
)
from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatcher
from vllm_kvzip.vllm_bridge.attention.tiered_batches import TieredBatch
from vllm_kvzip.vllm_bridge.cache.cpu_pages import discover_codec

pytestmark = pytest.mark.vllm

TERMS = {
    "plain": IMPL,
    "sinks": SimpleNamespace(
        scale=0.3, logits_soft_cap=0, sinks=torch.linspace(-2, 9, HEADS * GROUP).bfloat16()
    ),
    "cap": SimpleNamespace(scale=0.3, logits_soft_cap=5.0, sinks=None),
    "both": SimpleNamespace(
        scale=0.3, logits_soft_cap=5.0, sinks=torch.linspace(9, -2, HEADS * GROUP)
    ),
}
ISA = _get_attn_isa(torch.float32, BLOCK, DIM)


def make_store(pages, quantization):
    codec = discover_codec(BLOCK, DIM, torch.float32, ISA)
    return PackedPages(pages, codec, BLOCK, DIM, quantization)


def make_rows(pages, quantization):
    return RowPages(pages, BLOCK, DIM, quantization)


def world(make_store=make_store, **settings):
    torch.manual_seed(4)
    made = TieredWorld(make_store, **settings)
    made.add("a", 500, 530)
    made.add("b", 320, 320 + 40)
    made.add("plain", 0, 77, compressed=False)
    made.add("c", 400, 411)
    return made


@pytest.mark.parametrize("settings", [{}, {"mode": "quantize", "ratio": 1.0, "rotation": "none"}])
@pytest.mark.parametrize(
    ("names", "query_lens"),
    [
        (["a"], [1]),
        (["c", "a", "b"], [1, 1, 1]),
        (["c", "plain", "a"], [1, 1, 1]),
        (["a", "b"], [5, 3]),
        (["b"], [29]),
        (["plain", "a", "b", "c"], [20, 25, 1, 11]),
    ],
)
@pytest.mark.parametrize("terms", list(TERMS))
def test_every_query_sees_what_its_request_keeps(settings, names, query_lens, terms):
    impl = TERMS[terms]
    made = world(**settings)
    batcher = HeadSequenceBatcher(made.cache, ISA)
    common, query = made.step(names, query_lens)
    split = batcher.split(names, common, made.states)
    assert isinstance(split.compressed, TieredBatch)
    for name, layer in NAMES.items():
        output = torch.full_like(query, float("nan"))
        split.compressed.attend(impl, SimpleNamespace(layer_name=name), query, output)
        wanted = made.expected(names, query_lens, query, layer, impl)
        start = 0
        for request, count in zip(names, query_lens, strict=True):
            rows = slice(start, start + count)
            start += count
            if request == "plain":
                assert output[rows].isnan().all()  # left to vLLM's kernel
            else:
                torch.testing.assert_close(output[rows], wanted[rows], rtol=1e-3, atol=1e-4)


def test_a_batch_without_quantized_pages_is_left_to_vllms_kernel():
    made = world()
    made.rule = made.press._rule = made.rule.__class__(1.0, 0, 2, 2, BLOCK)
    made.add("whole", 200, 210)
    batcher = HeadSequenceBatcher(made.cache, ISA)
    common, _ = made.step(["whole"], [1])
    assert isinstance(batcher.split(["whole"], common, made.states).compressed, HeadSequenceBatch)
    common, _ = made.step(["whole", "a"], [1, 1])
    assert isinstance(batcher.split(["whole", "a"], common, made.states).compressed, TieredBatch)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")
@pytest.mark.parametrize("settings", [{}, {"mode": "quantize", "ratio": 1.0, "rotation": "none"}])
@pytest.mark.parametrize("terms", ["plain", "both"])
def test_our_kernel_sees_the_same(settings, terms):
    """Requests come and go; slots are given anew, and one of them has no compressed prefix."""
    made = world(make_rows, **settings)
    batcher = KernelBatcher(made.cache, max_requests=3)
    for names, query_lens in (
        (["a"], [1]),
        (["plain", "a", "b"], [1, 1, 1]),
        (["c", "b", "plain"], [3, 1, 9]),
    ):
        common, query = made.step(names, query_lens)
        split = batcher.split(names, common, made.states)
        num_tokens = split.dense_tokens.start if split.dense_tokens else len(query)
        output = torch.full_like(query[:num_tokens], float("nan"))
        layer = SimpleNamespace(layer_name="second")
        split.compressed.attend(TERMS[terms], layer, query[:num_tokens], output)
        wanted = made.expected(names, query_lens, query, 1, TERMS[terms])[:num_tokens]
        torch.testing.assert_close(output, wanted, rtol=1e-3, atol=1e-4)
