"""Head pages as vLLM's CPU ops really write and read them."""

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_kvzip.storage.page_store import PackedPages
from vllm_kvzip.vllm_bridge.cache.cpu_pages import discover_codec

pytestmark = pytest.mark.vllm

HEADS, BLOCKS = 2, 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 128])
@pytest.mark.parametrize("head_dim", [32, 64, 80, 128])
def test_the_codec_reads_what_the_op_wrote_and_writes_what_it_would(dtype, block_size, head_dim):
    torch.manual_seed(0)
    isa = _get_attn_isa(dtype, block_size, head_dim)
    codec = discover_codec(block_size, head_dim, dtype, isa)
    tokens = BLOCKS * block_size
    keys, values = (torch.randn(tokens, HEADS, head_dim).to(dtype) for _ in range(2))
    cache = torch.zeros(BLOCKS, HEADS, 2 * block_size, head_dim, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, torch.arange(tokens), isa)

    store = PackedPages(cache.view(BLOCKS * HEADS, -1), codec, block_size, head_dim)
    pages = torch.arange(BLOCKS * HEADS).view(BLOCKS, HEADS).t()
    assert torch.equal(store.read_keys(pages, 0), keys.transpose(0, 1))
    assert torch.equal(store.read_values(pages, 0), values.transpose(0, 1))

    other = torch.zeros_like(cache)
    target = PackedPages(other.view(BLOCKS * HEADS, -1), codec, block_size, head_dim)
    by_head = (part.transpose(0, 1).reshape(-1, head_dim) for part in (keys, values))
    target.write(pages.flatten(), *by_head)
    assert torch.equal(other, cache)
