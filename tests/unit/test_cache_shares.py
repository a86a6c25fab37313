"""How much of a request's KV cache is in layers that are compressed: plain arithmetic."""

import pytest

from vllm_kvzip.model.cache_shares import AlikeLayers, compressed_share, in_percent


@pytest.mark.parametrize(
    ("layers", "num_tokens", "blocks"),
    [
        (AlikeLayers(1), 16, 1),
        (AlikeLayers(1), 17, 2),
        (AlikeLayers(1, window=64), 17, 2),  # it is not full yet
        (AlikeLayers(1, window=64), 64, 4),
        (AlikeLayers(1, window=64), 65, 5),  # it begins inside the first block
        (AlikeLayers(1, window=64), 10_000, 5),
        (AlikeLayers(1, window=65), 10_000, 6),
        (AlikeLayers(1, state_blocks=2), 1, 2),
        (AlikeLayers(1, state_blocks=2), 10_000, 2),
    ],
)
def test_blocks_of_a_request(layers, num_tokens, blocks):
    assert layers.blocks(num_tokens, block_size=16) == blocks


GEMMA_3_27B = 10, [AlikeLayers(52, window=1024)]
QWEN3_NEXT_80B = 12, [AlikeLayers(12, state_blocks=2)] * 3


@pytest.mark.parametrize(
    ("model", "block_size", "shares"),
    [
        (GEMMA_3_27B, 16, {512: 0.161, 8192: 0.602, 32768: 0.858, 131072: 0.960}),
        (QWEN3_NEXT_80B, 544, {8192: 0.727, 32768: 0.910, 131072: 0.976}),
        ((32, []), 16, {8192: 1.0}),
    ],
)
def test_shares_of_published_models(model, block_size, shares):
    found = {tokens: compressed_share(*model, tokens, block_size) for tokens in shares}
    assert found == pytest.approx(shares, abs=5e-4)


def test_gemma_3_27b_counted_by_hand():
    """8,192 blocks of 16 tokens in each of 10 layers, and a window of 64 blocks in 52 others."""
    full, windows = 10 * 8192, 52 * (64 + 1)
    assert compressed_share(*GEMMA_3_27B, 131072, 16) == full / (full + windows)


def test_only_all_is_100_percent():
    assert [in_percent(share) for share in (0.604, 0.994, 0.9996, 1.0)] == [
        "60%", "99%", ">99%", "100%"
    ]  # fmt: skip
