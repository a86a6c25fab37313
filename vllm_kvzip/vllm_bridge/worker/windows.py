"""Worker side: vLLM's cache of layers with a sliding window, for passes that read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.vllm_bridge.cache.cache_view import map_head_pages
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
from vllm_kvzip.vllm_bridge.fp8_cache import read_scales
from vllm_kvzip.vllm_bridge.passes.window_caches import WindowCaches, WindowGroup
from vllm_kvzip.vllm_bridge.symbols import Attention, get_layers_from_vllm_config

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import KVCacheConfig
    from vllm_kvzip.vllm_bridge.worker.worker import HeadPageWorker


def find_windows(
    worker: HeadPageWorker, kv_cache_config: KVCacheConfig, compressed: CompressedGroup
) -> WindowCaches | None:
    """All KV cache groups beside the compressed one, which are of layers with a sliding window.

    Args:
        worker: ours.
        kv_cache_config: vLLM's placement of the layers.
        compressed: the compressed group.

    Returns:
        None where there is no other group.

    Raises:
        UnsupportedError: if the cache is not laid out page by page.
    """
    groups = [
        _window_group(worker, kv_cache_config, group_id, compressed.block_sizes)
        for group_id in range(len(kv_cache_config.kv_cache_groups))
        if group_id != compressed.group_id
    ]
    return WindowCaches(groups) if groups else None


def _window_group(
    worker: HeadPageWorker,
    kv_cache_config: KVCacheConfig,
    group_id: int,
    block_sizes: tuple[int, ...],
) -> WindowGroup:
    group = kv_cache_config.kv_cache_groups[group_id]
    spec, names = group.kv_cache_spec, tuple(group.layer_names)
    by_name = get_layers_from_vllm_config(worker.vllm_config, Attention, names)
    layers = [by_name[name] for name in names]
    pages, pool = map_head_pages(
        kv_cache_config,
        CompressedGroup(group_id, names, block_sizes),
        spec,
        [layer.kv_cache for layer in layers],
        worker.cache_config.get_resolved_kv_cache_layout(),
    )
    builders = [
        builder
        for attn_group in worker.model_runner.attn_groups[group_id]
        for builder in attn_group.metadata_builders
    ]
    scales = read_scales(layers, spec.num_kv_heads, worker.model_config.dtype)
    geometry = CacheGeometry(
        num_layers=len(names),
        num_kv_heads=spec.num_kv_heads,
        group_size=layers[0].num_heads // spec.num_kv_heads,
        head_dim=spec.head_size,
        block_size=spec.block_size,
    )
    return WindowGroup(
        group_id=group_id,
        window=spec.sliding_window,
        block_size=spec.block_size,
        pool=pool,
        store=worker.page_store(pages, geometry, builders, None, scales),
        layer_index={name: index for index, name in enumerate(names)},
    )
