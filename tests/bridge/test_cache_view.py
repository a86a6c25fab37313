"""The pool of head pages over vLLM's buffer, when other KV cache groups lie in it too."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheTensor,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.cache.cache_view import map_head_pages
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup

pytestmark = pytest.mark.vllm

BLOCKS, HEADS, SIZE, DIM = 3, 2, 16, 4
PAGE = 4 * 2 * SIZE * DIM  # bytes
SPEC = FullAttentionSpec(block_size=SIZE, num_kv_heads=HEADS, head_size=DIM, dtype=torch.float32)
GROUP = CompressedGroup(1, ("c", "d"), (16, 16))


def placed(offset, *names):
    return KVCacheTensor(
        size=4 * BLOCKS * HEADS * PAGE, layers=list(names), layer_stride=BLOCKS * HEADS * PAGE,
        block_stride=HEADS * PAGE, offset=offset,
    )  # fmt: skip


def config(*tensors):
    groups = [KVCacheGroupSpec(list(names), SPEC) for names in (("a", "b"), GROUP.layer_names)]
    return KVCacheConfig(BLOCKS, list(tensors), groups)


@pytest.fixture
def layers():
    """vLLM's views of the layers ``c`` and ``d``, behind those of ``a`` and ``b``."""
    buffer = torch.arange(4 * BLOCKS * HEADS * 2 * SIZE * DIM).float()
    by_layer = buffer.view(4, BLOCKS, HEADS, SIZE, 2 * DIM)
    return [by_layer[2], by_layer[3]]


def test_pages_are_those_of_the_groups_own_layers(layers):
    both = config(placed(0, "a", "b"), placed(2 * BLOCKS * HEADS * PAGE, "c", "d"))
    pages, pool = map_head_pages(both, GROUP, SPEC, layers, KVCacheLayout.LBHNC)
    assert pool.num_layers == 2
    for layer, cache in enumerate(layers):
        for block in range(BLOCKS):
            for head in range(HEADS):
                page = pages[pool.page_id(layer, block, head)]
                assert torch.equal(page, cache[block, head].flatten())


def test_layers_in_several_tensors_are_refused(layers):
    apart = config(placed(0, "a", "b"), placed(0, "c"), placed(0, "d"))
    with pytest.raises(UnsupportedError, match="all layers of a KV cache group in one"):
        map_head_pages(apart, GROUP, SPEC, layers, KVCacheLayout.LBHNC)


def test_another_layout_is_refused(layers):
    other = SimpleNamespace(name="LBNHC")
    with pytest.raises(UnsupportedError, match="but vLLM chose LBNHC"):
        map_head_pages(config(), GROUP, SPEC, layers, other)
