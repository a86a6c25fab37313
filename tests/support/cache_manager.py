"""vLLM's KV cache manager with our block manager inside, over blocks that hold nothing."""

import torch
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
from vllm_kvzip.vllm_bridge.scheduler.scheduler import introduce_requests


def build_cache(directory, block_size, num_blocks, reuse, **rule):
    """The cache manager, our manager in it, and what hashes a request's blocks."""
    init_none_hash(sha256)
    spec = HeadPageSpec(
        block_size=block_size, num_kv_heads=2, head_size=8, dtype=torch.float32, num_layers=3,
        rule=PrefixRule(sink_tokens=2, recent_tokens=8, block_size=block_size, **rule),
        metrics_directory=str(directory), reuse=reuse,
    )  # fmt: skip
    config = KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    cache = KVCacheManager(
        config, max_model_len=4096, scheduler_block_size=block_size, hash_block_size=block_size,
        enable_caching=True,
    )  # fmt: skip
    group = CompressedGroup.find(config, HeadPageSpec)
    return cache, introduce_requests(cache, group), get_request_block_hasher(block_size, sha256)
