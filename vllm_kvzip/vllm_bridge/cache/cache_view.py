"""Where the head pages are in vLLM's cache.

vLLM allocates one buffer for all layers, and places the layers of each KV cache group in it. Under
the layout ``LBHNC`` what one KV head has in one block of one layer is a contiguous run of
``2 * block_size * head_dim`` elements: one head page, or several equal ones where a row of it is a
token's key and value.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.vllm_bridge.symbols import KVCacheLayout

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
    from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
    from vllm_kvzip.vllm_bridge.symbols import KVCacheConfig


def map_head_pages(
    kv_cache_config: KVCacheConfig,
    group: CompressedGroup,
    spec: HeadPageSpec,
    layer_caches: Sequence[torch.Tensor],
    layout: KVCacheLayout,
    pages_per_head: int = 1,
) -> tuple[torch.Tensor, PagePool]:
    """View vLLM's cache as one flat pool of head pages, without a copy.

    Args:
        kv_cache_config: vLLM's placement of the layers.
        group: whose layers are viewed.
        spec: of the group.
        layer_caches: vLLM's view of each layer, ``[B, H, N, 2 * D]``, in the group's order.
        layout: the resolved layout.
        pages_per_head: head pages that one KV head of a layer has in a block.

    Returns:
        ``[num_pages, 2 * N * head_dim]``, N tokens of a page, over the whole buffer, and the
        arithmetic that finds a page in it.

    Raises:
        UnsupportedError: when the buffer is not laid out page by page.
    """
    if layout is not KVCacheLayout.LBHNC:
        raise UnsupportedError(
            f"KV compression needs the KV cache layout LBHNC, but vLLM chose {layout.name}; unset "
            f"VLLM_KV_CACHE_LAYOUT."
        )
    names = list(group.layer_names)
    placements = [one for one in kv_cache_config.kv_cache_tensors if one.layers == names]
    if len(placements) != 1:
        raise UnsupportedError(
            "KV compression needs all layers of a KV cache group in one of vLLM's tensors; this "
            "vLLM version is not supported."
        )
    (placement,) = placements
    first = layer_caches[0]
    if first.shape[2] != spec.block_size:
        raise UnsupportedError(
            f"KV compression needs blocks of {spec.block_size} tokens whole, but vLLM's attention "
            f"kernel takes them in parts of {first.shape[2]}; set --attention-backend TRITON_ATTN."
        )
    num_heads = spec.num_kv_heads
    page_elements = 2 * spec.block_size // pages_per_head * spec.head_size
    page_bytes = page_elements * first.element_size()
    strides = (placement.layer_stride, placement.block_stride, placement.offset)
    if any(stride % page_bytes for stride in strides):
        raise UnsupportedError(
            f"KV compression needs whole head pages of {page_bytes} bytes, but vLLM placed layers "
            f"and blocks at strides {strides} bytes; choose another --block-size."
        )
    pool = PagePool(
        num_blocks=kv_cache_config.num_blocks,
        num_layers=group.num_layers,
        num_kv_heads=num_heads,
        first_page=placement.offset // page_bytes,
        layer_stride=placement.layer_stride // page_bytes,
        block_stride=placement.block_stride // page_bytes,
        pages_per_head=pages_per_head,
    )
    num_pages = first.untyped_storage().nbytes() // page_bytes
    pages = first.as_strided((num_pages, page_elements), (page_elements, 1), 0)
    for layer, cache in enumerate(layer_caches):
        corner = pages[pool.page_id(layer, 0, 0)]
        if cache.data_ptr() != corner.data_ptr() or not cache[0].is_contiguous():
            raise UnsupportedError(
                f"KV compression found layer {names[layer]} elsewhere than vLLM's cache "
                f"config says; this vLLM version is not supported."
            )
    return pages, pool
