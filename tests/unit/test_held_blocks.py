"""The soak's own formulas and the plugin's say the same, over lengths, ratios and formats."""

import itertools

import pytest

from soaking.held_blocks import HeldBlocks, quantized_tokens
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import RequestOptions
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.quantization.choice import choose_quantization

FORMATS, BLOCK, PROTECTED = ("nf4", "int4", "int8"), 32, (4, 16)
RATIOS = (0.01, 0.15, 0.25, 0.3, 0.4, 0.7, 0.95, 1.0)


def plugin_tokens(name, page_bytes, head_dim):
    return choose_quantization(
        page_bytes=page_bytes, head_dim=head_dim, keys=name, values=name, rotation="none"
    ).head_page_tokens


def test_a_page_holds_what_its_bytes_do():
    # 8 KiB; a token has 2 * (16 + 1), 2 * (16 + 4) or 2 * (32 + 2) bytes.
    assert [quantized_tokens(name, 8192, 32) for name in FORMATS] == [240, 192, 120]


@pytest.mark.parametrize("name", FORMATS)
def test_pages_of_every_shape(name):
    for head_dim, block, itemsize in itertools.product(
        (16, 32, 48, 64, 80, 96, 128, 256), (16, 32, 64, 128), (2, 4)
    ):
        page_bytes = 2 * block * head_dim * itemsize
        expected = plugin_tokens(name, page_bytes, head_dim)
        assert quantized_tokens(name, page_bytes, head_dim) == expected


@pytest.mark.parametrize("server_ratio", [0.4, 1.0])
@pytest.mark.parametrize("name", [None, *FORMATS])
def test_what_is_compressed_into_how_many_blocks(name, server_ratio):
    held, tiers = 0, None
    if name is not None:
        held = quantized_tokens(name, 8192, 32)
        tiers = TierRule("quantize", BLOCK, held // 4, split=4)
    pool = 36
    rule = PrefixRule(
        server_ratio, 256, *PROTECTED, BLOCK, pool_blocks=pool + 1, tiers=tiers
    )  # fmt: skip
    mode = "evict" if name is None else "quantize"
    formula = HeldBlocks(server_ratio, sum(PROTECTED), BLOCK, mode, held)
    compressed = 0
    for length, ratio, context in itertools.product(
        range(200, 900, 37), (None, *RATIOS), (None, 0, 255, 256, 300)
    ):
        if context is not None and context > length:
            continue
        options = {"kvzip_keep_ratio": ratio, "kvzip_context_tokens": context}
        options = {key: value for key, value in options.items() if value is not None}
        plan = rule.plan(length, RequestOptions.read(options))
        blocks = formula.prefix_blocks(length, options, pool)
        assert blocks == (plan and plan.num_prefix_blocks), (length, options)
        if plan is not None:
            compressed += 1
            kept = formula.kept(blocks, ratio or server_ratio)
            assert kept == plan.num_compressed_blocks, (length, options)
    assert compressed > 100
