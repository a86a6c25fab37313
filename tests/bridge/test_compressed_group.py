"""The compressed group is found among vLLM's own KV cache groups, wherever it is."""

from dataclasses import replace
from math import ceil
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup, block_bytes
from vllm_kvzip.vllm_bridge.scheduler.terms import CompressionTerms

pytestmark = pytest.mark.vllm

SHAPE = {"block_size": 16, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
WINDOW = KVCacheGroupSpec(["layers.0", "layers.2"], SlidingWindowSpec(**SHAPE, sliding_window=64))
FULL = KVCacheGroupSpec(["layers.1", "layers.3", "layers.5"], FullAttentionSpec(**SHAPE))
COMPRESSED = KVCacheGroupSpec(["layers.1", "layers.3", "layers.5"], HeadPageSpec(**SHAPE))


def config(*groups):
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=list(groups))


@pytest.mark.parametrize(
    ("spec_type", "group"),
    [(FullAttentionSpec, FULL), (HeadPageSpec, COMPRESSED), (CompressionTerms, COMPRESSED)],
)
def test_the_group_is_found_after_another_one(spec_type, group):
    found = CompressedGroup.find(config(WINDOW, group), spec_type)
    assert found == CompressedGroup(1, ("layers.1", "layers.3", "layers.5"), (16, 16))
    assert found.num_layers == 3
    assert found.row(([1, 2], [3])) == [3]


def test_an_only_group_has_id_0():
    assert CompressedGroup.find(config(COMPRESSED), HeadPageSpec).group_id == 0


@pytest.mark.parametrize(
    ("groups", "what"),
    [
        ((), "made 0 .specs of all groups: none."),
        ((WINDOW, FULL), "made 0 .specs of all groups: SlidingWindowSpec, FullAttentionSpec."),
        ((COMPRESSED, WINDOW, COMPRESSED), "made 2 "),
    ],
)
def test_no_group_or_several_are_refused_in_one_sentence(groups, what):
    with pytest.raises(UnsupportedError, match=what) as error:
        CompressedGroup.find(config(*groups), HeadPageSpec)
    assert str(error.value).count(".") == 1


def test_other_groups_take_their_part_of_the_pool():
    """A window of 64 tokens, and the step of 128 that is being computed: 192 tokens at most."""
    both = replace(config(WINDOW, COMPRESSED), num_blocks=100)
    settings = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=4096),
        max_in_flight_tokens=128,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
    )
    of_window = ceil((64 - 1 + 128) / 16) + 1
    found = CompressedGroup.find(both, HeadPageSpec)
    assert found.share_of_pool(both, settings) == 100 - of_window
    alone = replace(both, kv_cache_groups=[COMPRESSED])
    assert CompressedGroup.find(alone, HeadPageSpec).share_of_pool(alone, settings) == 100


def test_the_largest_group_sizes_a_block():
    page = HeadPageSpec(**SHAPE).page_size_bytes
    assert block_bytes(config(WINDOW, COMPRESSED)) == block_bytes(config(COMPRESSED)) == 3 * page
    assert block_bytes(config(WINDOW)) == 2 * page


def test_a_merged_spec_counts_the_layers_of_its_group():
    layer = HeadPageSpec(**SHAPE)
    assert layer.merge([layer] * 3).block_bytes == 3 * layer.page_size_bytes
