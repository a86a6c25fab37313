"""Worker side: the end of a context in vLLM's cache, of the layers with a sliding window.

Blocks that a window has left go back to the pool while a request is read, and others write to
them. What the pass needs is still there whenever it runs, at the start of a step:

* What the scheduler frees in a step has not been written yet at its start, for the same reason as
  in :mod:`vllm_kvzip.vllm_bridge.worker.head_page_runtime`.
* Until the step that completes the prefix, the scheduler frees nothing that a token at the
  boundary sees (``vllm_bridge/scheduler/other_groups.py``).
* A request does not begin behind the boundary of a prefix that it is to compress
  (``vllm_bridge/scheduler/prefix_lookup.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.vllm_bridge.cache.cache_view import map_head_pages
from vllm_kvzip.vllm_bridge.compressed_group import NULL_BLOCK, CompressedGroup
from vllm_kvzip.vllm_bridge.fp8_cache import read_scales
from vllm_kvzip.vllm_bridge.symbols import (
    Attention,
    async_tensor_h2d,
    get_layers_from_vllm_config,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_kvzip.storage.head_pages import PagePool
    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.vllm_bridge.passes.scoring_pass import RepeatedContext
    from vllm_kvzip.vllm_bridge.passes.window_pass import KeysAndValues
    from vllm_kvzip.vllm_bridge.symbols import KVCacheConfig


@dataclass(frozen=True)
class WindowGroup:
    """A KV cache group of layers with a sliding window, seen as head pages.

    Attributes:
        group_id: index of the group in everything that vLLM keeps per group.
        window: tokens that the window holds, a token's own among them.
        block_size: tokens per block.
        pool: tells where head pages are.
        store: reads them.
        layer_index: vLLM's layer name -> layer of the group.
    """

    group_id: int
    window: int
    block_size: int
    pool: PagePool
    store: PageStore
    layer_index: Mapping[str, int]

    def first_seen(self, num_tokens: int) -> int:
        """The first token that the token after ``num_tokens`` tokens sees."""
        return max(0, num_tokens - self.window + 1)


@dataclass(eq=False)
class ContextEnd:
    """Where the end of one context lies.

    Attributes:
        num_cached: how many tokens of the context are in the cache: all, or all but the last one.
        pages: int64 ``[L, H, n]`` by group, from the block of the first token that is read on.
        last_token: keys and values ``[H, 1, D]`` of the context's last token by vLLM's layer name,
            once they are known, where the cache does not have them.
    """

    num_cached: int
    pages: Mapping[int, torch.Tensor]
    last_token: dict[str, KeysAndValues] = field(default_factory=dict)


class WindowCaches:
    """Reads vLLM's cache of all layers with a sliding window; see the module docstring.

    Args:
        groups: theirs.

    Attributes:
        windows: see :class:`~vllm_kvzip.vllm_bridge.passes.window_pass.WindowEnds`.
    """

    def __init__(self, groups: Sequence[WindowGroup]) -> None:
        self._groups = {group.group_id: group for group in groups}
        self._group_of = {name: group for group in groups for name in group.layer_index}
        self.windows = {name: group.window for name, group in self._group_of.items()}

    def find_end(self, num_cached: int, rows: Mapping[int, Sequence[int]]) -> ContextEnd:
        """Where the end of a context lies.

        Args:
            num_cached: see :class:`ContextEnd`.
            rows: block table rows of its request, by group.

        Raises:
            RuntimeError: if a block is not there any more.
        """
        pages = {}
        for group_id, group in self._groups.items():
            size = group.block_size
            first, last = group.first_seen(num_cached) // size, -(-num_cached // size)
            blocks = list(rows[group_id][first:last])
            if len(blocks) < last - first or NULL_BLOCK in blocks:
                raise RuntimeError("the cache has lost what a sliding window sees of the context")
            ids = async_tensor_h2d(blocks, group.store.device, torch.int64)
            pages[group_id] = group.pool.page_ids(ids)
        return ContextEnd(num_cached, pages)

    def read_end(self, name: str, context: RepeatedContext) -> KeysAndValues:
        """See :class:`~vllm_kvzip.vllm_bridge.passes.window_pass.WindowEnds`."""
        group, end = self._group_of[name], context.end
        assert end is not None
        layer, first = group.layer_index[name], group.first_seen(end.num_cached)
        start = first // group.block_size * group.block_size
        inside = slice(first - start, end.num_cached - start)
        pages = end.pages[group.group_id][layer]
        keys = group.store.read_keys(pages, layer)[:, inside]
        values = group.store.read_values(pages, layer)[:, inside]
        if name not in end.last_token:
            return keys, values
        last_key, last_value = end.last_token[name]
        return torch.cat([keys, last_key], dim=1), torch.cat([values, last_value], dim=1)


def find_windows(
    worker: Any, kv_cache_config: KVCacheConfig, compressed: CompressedGroup
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
    worker: Any,
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
