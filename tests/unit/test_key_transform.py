"""Keys with a large constant part lose as little when they are quantized as keys without one."""

import pytest
import torch

from vllm_kvzip.model.key_transform import LARGEST_SCALE, MOST_FIRST, KeyTransform, num_first
from vllm_kvzip.quantization import choose_quantization
from vllm_kvzip.quantization.reading import PageReader
from vllm_kvzip.storage.tiered_attention import TieredAttention, TierPages

DIM, SINKS, SCALE = 64, 4, 64**-0.5
PAIR = [3, 35]  # the two dimensions that a rotary embedding turns together


def biased(keys, turns_a_token):
    """Keys ``[T, D]`` with 100 more in one channel, turned by so much a token."""
    angle = torch.arange(len(keys)) * turns_a_token * 2 * torch.pi
    keys = keys.clone()
    keys[:, PAIR] += 100 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return keys


def attend(keys, values, queries, name):
    """Attention of queries ``[M, D]`` over quantized pages of all keys."""
    chosen = choose_quantization(
        page_bytes=8192, head_dim=DIM, keys=name, values=name, rotation="auto"
    )
    each = chosen.layout.page_tokens
    transform = KeyTransform.fit(keys[None], SINKS)
    stored = transform.apply(keys[None], torch.arange(len(keys))[None]).view(-1, each, DIM)
    pages = chosen.pack(stored, values.view(-1, each, DIM))
    count = len(pages)
    empty = torch.zeros(0, dtype=torch.int64)
    attention = TieredAttention(
        reader=PageReader(chosen.layout), rotated=chosen.rotated, scale=SCALE,
        read_quantized=lambda ids: pages[ids],
        read_full=lambda _: (torch.zeros(0, 4, DIM), torch.zeros(0, 4, DIM)),
    )  # fmt: skip
    owners = torch.zeros(count, dtype=torch.int64)
    return attention.attend_rows(
        queries[None], TierPages(torch.arange(count), owners, torch.arange(count) * each),
        torch.tensor([len(keys)]), transform, TierPages(empty, empty, empty),
        torch.zeros(1, len(queries), dtype=torch.int64),
    )[0]  # fmt: skip


@pytest.mark.parametrize("name", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("turns_a_token", [0.0, 1e-4, 1e-3, 0.02, 0.16])
def test_a_bias_costs_next_to_nothing(name, turns_a_token):
    """Queries do not look at the biased channels, so attention is that without the bias."""
    torch.manual_seed(0)
    tokens = choose_quantization(
        page_bytes=8192, head_dim=DIM, keys=name, values=name, rotation="auto"
    ).head_page_tokens
    keys, values = torch.randn(2, 4 * tokens, DIM)
    keys[:SINKS] *= 0.3
    queries = 3 * torch.randn(40, DIM)
    queries[:, PAIR] = 0
    exact = (queries @ keys.T * SCALE).softmax(dim=-1) @ values
    usual = (attend(keys, values, queries, name) - exact).norm()
    found = (attend(biased(keys, turns_a_token), values, queries, name) - exact).norm()
    assert found < 1.3 * usual
    assert usual < 0.5 * exact.norm()


def test_keys_come_back():
    torch.manual_seed(1)
    keys = torch.randn(2, 3, 50, 8) * torch.tensor([1, 1, 1, 1, 1, 1, 1, 90.0]) + 30
    transform = KeyTransform.stack([KeyTransform.fit(part, 6) for part in keys])
    assert transform.first.shape == (2, 3, MOST_FIRST, 8)
    stored = transform.apply(keys, torch.arange(50).expand(2, 3, -1))
    assert (stored[:, :, :MOST_FIRST] == 0).all()
    torch.testing.assert_close(transform.undo(stored), keys)
    assert (transform.scale[..., :7] == 1).all()
    assert (transform.scale[..., 7] == 32).all()
    assert stored[:, :, 6:].mean(dim=2).abs().max() < 1e-4
    other = transform.where_first(torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(other.first, transform.mean[..., None, :].expand_as(other.first))


def test_every_head_has_a_transform():
    """Even one without a key behind the sinks, and one whose keys are all the same."""
    one = KeyTransform.fit(torch.randn(2, 4, 8), 4)
    assert (one.mean == 0).all()
    assert (one.scale == 1).all()
    same = torch.ones(2, 40, 8)
    same[:, :, 3] += torch.arange(40.0)
    found = KeyTransform.fit(same, 0)
    assert found.first.shape == (2, 0, 8)
    assert (found.scale[:, 3] == LARGEST_SCALE).all()
    assert found.apply(same, torch.arange(40).expand(2, -1)).isfinite().all()
    assert [num_first(sinks) for sinks in (0, 2, 100)] == [0, 2, MOST_FIRST]


def test_keys_of_layers_without_quantized_pages_stay_as_they_are():
    transform = KeyTransform.fit(torch.randn(2, 3, 20, DIM), SINKS)
    both = transform.with_unchanged(1)
    assert torch.equal(both.at(slice(0, 2)).packed, transform.packed)
    queries = torch.randn(3, 5, DIM)
    assert torch.equal(both.at(2).queries(queries), queries)
    assert not both.at(2).offsets(queries).any()
    assert not both.at(2).first_shift().any()
