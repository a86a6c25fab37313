"""Attention over head pages by vLLM's CPU kernel, against softmax written out in torch."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from softmax_terms import weights_of
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_kvzip.storage.page_store import PackedPages
from vllm_kvzip.vllm_bridge.attention.head_sequence_batches import HeadSequenceBatch
from vllm_kvzip.vllm_bridge.cache.cpu_pages import discover_codec

pytestmark = pytest.mark.vllm

HEADS, GROUP, DIM, BLOCK, LAYERS = 3, 2, 64, 32, 2


@pytest.mark.parametrize("query_lengths", [[1, 1, 1], [1, 4, 2]], ids=["decode", "several tokens"])
@pytest.mark.parametrize("with_others", [False, True], ids=["all compressed", "mixed batch"])
@pytest.mark.parametrize(
    ("sink_dtype", "soft_cap"),
    [(None, 0), (torch.bfloat16, 0), (torch.float16, 0), (None, 0.5), (torch.float32, 0.5)],
)
def test_every_head_sequence_attends_over_its_own_pages(
    query_lengths, with_others, sink_dtype, soft_cap
):
    torch.manual_seed(1)
    sinks = None if sink_dtype is None else (2 * torch.randn(HEADS * GROUP) + 2).to(sink_dtype)
    isa = _get_attn_isa(torch.float32, BLOCK, DIM)
    codec = discover_codec(BLOCK, DIM, torch.float32, isa)
    num_sequences = len(query_lengths) * HEADS
    seq_lens = torch.randint(5, 5 * BLOCK, (LAYERS, num_sequences), dtype=torch.int32)
    width = 5
    pages = torch.full((LAYERS * num_sequences * width + 7, 2 * BLOCK * DIM), float("nan"))
    order = torch.randperm(len(pages))[: LAYERS * num_sequences * width]
    tables = order.view(LAYERS, num_sequences, width).to(torch.int32)
    store = PackedPages(pages, codec, BLOCK, DIM)
    keys, values = (torch.randn(LAYERS, num_sequences, width * BLOCK, DIM) for _ in range(2))
    store.write(order, keys.view(-1, DIM), values.view(-1, DIM))

    lead = 2 if with_others else 0  # tokens of another request in front, which must stay untouched
    num_tokens = lead + sum(query_lengths)
    query = torch.randn(num_tokens, HEADS * GROUP, DIM)
    bounds = torch.tensor([0, *query_lengths]).cumsum(0) + lead
    tokens = [torch.arange(a, b) for a, b in pairwise(bounds)]
    lengths = torch.tensor(query_lengths).repeat_interleave(HEADS)
    starts = torch.zeros(num_sequences + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    single = not with_others and max(query_lengths) == 1
    heads = torch.arange(HEADS)[:, None]
    rows = torch.cat([(part * HEADS + heads).flatten() for part in tokens])
    halves = pages.view(-1, 1, 2 * BLOCK, DIM).chunk(2, dim=2)
    batch = HeadSequenceBatch(
        pages=halves, tables=tables, seq_lens=seq_lens, query_start_loc=starts,
        sequence_rows=None if single else rows, num_kv_heads=HEADS, group_size=GROUP, head_dim=DIM,
        layer_index={"first": 0, "second": 1}, isa=isa,
    )  # fmt: skip
    impl = SimpleNamespace(scale=DIM**-0.5, logits_soft_cap=soft_cap, sinks=sinks)
    for layer, name in enumerate(("first", "second")):
        output = torch.full_like(query, float("nan"))
        batch.attend(impl, SimpleNamespace(layer_name=name), query, output)
        assert output[:lead].isnan().all()
        for request, part in enumerate(tokens):
            for head in range(HEADS):
                sequence = request * HEADS + head
                length = int(seq_lens[layer, sequence])
                for index, token in enumerate(part.tolist()):
                    visible = length - len(part) + index + 1
                    own_keys = keys[layer, sequence, :visible]
                    own_values = values[layer, sequence, :visible]
                    for member in range(head * GROUP, (head + 1) * GROUP):
                        logits = own_keys @ query[token, member] * impl.scale
                        sink = None if sinks is None else sinks[member]
                        weights = weights_of(logits[None], soft_cap, sink)[0]
                        torch.testing.assert_close(
                            output[token, member], weights @ own_values, atol=1e-4, rtol=1e-3
                        )
