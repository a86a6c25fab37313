"""Attention over ordinary and quantized pages equals one softmax over what the pages hold."""

import pytest
import torch
from softmax_terms import weights_of

from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.quantization import choose_quantization, pack_pages, rotate, unpack_pages
from vllm_kvzip.quantization.reading import PageReader
from vllm_kvzip.quantization.rotation import rotate_back
from vllm_kvzip.storage.tiered_attention import TieredAttention, TierPages

N = 8
TERMS = [(0.0, False), (4.0, False), (0.0, True), (4.0, True)]  # soft cap, learned logits
FORMATS = [("nf4", "nf4"), ("int4", "int4"), ("int8", "int8"), ("int8", "nf4"), ("nf4", "int4")]


def quantization(keys, values, head_dim, rotation="auto"):
    return choose_quantization(
        page_bytes=2 * N * head_dim * 4, head_dim=head_dim, keys=keys, values=values,
        rotation=rotation,
    )  # fmt: skip


@pytest.mark.parametrize(("keys", "values"), FORMATS)
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96])
def test_the_reader_reads_what_the_reference_reads(keys, values, head_dim):
    layout = quantization(keys, values, head_dim).layout
    vectors = torch.randn(2, 5 * layout.page_tokens - 3, head_dim)
    pages = pack_pages(*vectors, layout)
    reader = PageReader(layout)
    wanted = unpack_pages(pages, layout)
    orders = reader.key_order, reader.value_order
    for read, order, reference in zip(reader.read(pages), orders, wanted, strict=True):
        assert torch.equal(read.flatten(0, 1), reference[:, order])


class Pool:
    """Random pages of both tiers, and what each sequence attends over."""

    def __init__(self, num_sequences, group, chosen, head_dim, quantized, ordinary):
        self.layout, self.rotated = chosen.layout, chosen.rotated
        page_tokens = self.layout.page_tokens
        self.sequences = []
        num_pages = [-(-n // page_tokens) for n in quantized]
        self.bytes = torch.full((sum(num_pages) + 1, self.layout.page_bytes), 255).byte()
        self.full = torch.full((2, 64, N, head_dim), float("nan"))
        ids = torch.randperm(64)
        first = used = 0
        rows = {"ids": [], "owners": [], "first": []}
        tiers = {"quantized": rows, "full": {name: [] for name in rows}}
        self.transform = KeyTransform(
            torch.randn(num_sequences, head_dim) * 5,
            2.0 ** torch.randint(3, (num_sequences, head_dim)),
            torch.randn(num_sequences, 3, head_dim) * 5,
        )
        for number in range(num_sequences):
            of_keys = self.transform.at(number)
            keys, values = torch.randn(2, quantized[number], head_dim) * 2
            own = torch.arange(first, first + num_pages[number])
            first += num_pages[number]
            held = keys, values
            if len(own):
                turned = (rotate(keys), rotate(values)) if self.rotated else (keys, values)
                self.bytes[own] = pack_pages(*turned, self.layout)
                held = tuple(h[: len(keys)] for h in unpack_pages(self.bytes[own], self.layout))
                held = tuple(map(rotate_back, held)) if self.rotated else held
            held = of_keys.undo(held[0]), held[1]
            count = -(-ordinary[number] // N)
            pages, used = ids[used : used + count], used + count
            tail = torch.randn(2, ordinary[number], head_dim)
            for half in range(2):
                for index, page in enumerate(pages):
                    part = tail[half, index * N : (index + 1) * N]
                    self.full[half, page, : len(part)] = part
            for name, of_tier, size in (("quantized", own, page_tokens), ("full", pages, N)):
                tiers[name]["ids"].append(of_tier)
                tiers[name]["owners"].append(torch.full((len(of_tier),), number))
                tiers[name]["first"].append(torch.arange(len(of_tier)) * size)
            self.sequences.append(tuple(torch.cat([h, t]) for h, t in zip(held, tail, strict=True)))
        self.tiers = {
            name: TierPages(*(torch.cat(tiers[name][c]).long() for c in ("ids", "owners", "first")))
            for name in tiers
        }

    def attention(self, scale, soft_cap):
        return TieredAttention(
            reader=PageReader(self.layout),
            rotated=self.rotated,
            read_quantized=lambda ids: self.bytes[ids],
            read_full=lambda ids: (self.full[0, ids], self.full[1, ids]),
            scale=scale,
            soft_cap=soft_cap,
        )

    def reference(self, number, queries, scale, soft_cap, sinks):
        """Rows of ``queries`` ``[M, D]``; the i-th of them sees all but ``M - 1 - i`` tokens."""
        keys, values = self.sequences[number]
        logits = queries @ keys.T * scale
        last = len(keys) - len(queries) + torch.arange(len(queries))
        logits = logits.masked_fill(torch.arange(len(keys)) > last[:, None], float("-inf"))
        return weights_of(logits, soft_cap, sinks) @ values


@pytest.mark.parametrize(("keys", "values"), FORMATS)
@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize(("soft_cap", "has_sinks"), TERMS)
def test_few_rows_of_many_sequences(keys, values, rotation, soft_cap, has_sinks, monkeypatch):
    torch.manual_seed(1)
    monkeypatch.setattr("vllm_kvzip.storage.tiered_attention.VALUES_AT_ONCE", 32 * 120)
    head_dim, steps, scale = 32, 3, 0.2
    chosen = quantization(keys, values, head_dim, rotation)
    page_tokens = chosen.layout.page_tokens
    quantized = [2 * page_tokens, page_tokens + 5, 0, 1]
    ordinary = [3, 2 * N + 4, 5, 4 * N]
    pool = Pool(4, 2, chosen, head_dim, quantized, ordinary)
    queries = torch.randn(4, steps, head_dim)
    seen = torch.tensor(ordinary)[:, None] - (steps - 1 - torch.arange(steps))
    sinks = 4 * torch.randn(4, steps) if has_sinks else None
    attended = pool.attention(scale, soft_cap).attend_rows(
        queries,
        pool.tiers["quantized"],
        torch.tensor(quantized),
        pool.transform,
        pool.tiers["full"],
        seen,
        sinks,
    )
    for number in range(4):
        own = None if sinks is None else sinks[number, :, None]
        wanted = pool.reference(number, queries[number], scale, soft_cap, own)
        torch.testing.assert_close(attended[number], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
@pytest.mark.parametrize(("num_quantized", "num_full"), [(70, 40), (0, 40), (70, 17), (0, 17)])
@pytest.mark.parametrize(("soft_cap", "has_sinks"), TERMS)
def test_many_rows_of_one_sequence(rotation, num_quantized, num_full, soft_cap, has_sinks):
    torch.manual_seed(2)
    head_dim, group, rows, scale = 32, 3, 17, 0.2
    chosen = quantization("nf4", "int8", head_dim, rotation)
    pool = Pool(1, group, chosen, head_dim, [num_quantized], [num_full])
    queries = torch.randn(group, rows, head_dim)
    sinks = 4 * torch.randn(group) if has_sinks else None
    attended = pool.attention(scale, soft_cap).attend_causally(
        queries,
        pool.tiers["quantized"].ids,
        num_quantized,
        pool.transform.at(0),
        pool.tiers["full"].ids,
        num_full,
        sinks,
    )
    for member in range(group):
        own = None if sinks is None else sinks[member]
        wanted = pool.reference(0, queries[member], scale, soft_cap, own)
        torch.testing.assert_close(attended[member], wanted, rtol=1e-4, atol=1e-5)
