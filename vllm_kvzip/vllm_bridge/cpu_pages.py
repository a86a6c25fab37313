"""Where the head pages of vLLM's CPU cache lie, and in which order its kernel stores elements.

vLLM allocates one buffer for all layers. Under the layout ``LBHNC`` the page of one KV head in one
block of one layer is a contiguous run of ``2 * block_size * head_dim`` elements: first the keys,
then the values, each packed in an order that suits the instruction set. The order is found by
storing a known pattern through vLLM's own op, so nothing about it is assumed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm import _custom_ops as ops
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvzip.compaction import PageCodec
from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.head_pages import PagePool

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from vllm_kvzip.vllm_bridge.cache_spec import HeadPageSpec

_DIGIT = 64  # small enough to be exact in every cache dtype, bfloat16 and float8 excepted


def discover_codec(block_size: int, head_dim: int, dtype: torch.dtype, isa: str) -> PageCodec:
    """Find the element order of the CPU kernel inside one head page.

    Writes the numbers ``0 .. block_size * head_dim - 1``, one base-64 digit at a time so that every
    digit is exact in ``dtype``, through vLLM's own cache op and reads where they went.

    Args:
        block_size: tokens per page.
        head_dim: elements per key, and per value.
        dtype: the cache's dtype (float32, bfloat16 or float16).
        isa: vLLM's name of the instruction set variant of its attention kernel.
    """
    size = block_size * head_dim
    index = torch.arange(size)
    key_order = torch.zeros(size, dtype=torch.int64)
    value_order = torch.zeros(size, dtype=torch.int64)
    weight = 1
    while weight < size:
        digit = (index // weight % _DIGIT).view(block_size, 1, head_dim).to(dtype)
        page = torch.zeros(1, 1, 2 * block_size, head_dim, dtype=dtype)
        key_page, value_page = page.chunk(2, dim=2)
        slots = torch.arange(block_size, dtype=torch.int64)
        ops.cpu_attn_reshape_and_cache(digit, digit, key_page, value_page, slots, isa)
        stored = page.view(2, size).to(torch.int64)
        key_order += stored[0] * weight
        value_order += stored[1] * weight
        weight *= _DIGIT
    return PageCodec(key_order=key_order, value_order=value_order)


def map_head_pages(
    kv_cache_config: KVCacheConfig,
    spec: HeadPageSpec,
    layer_caches: list[torch.Tensor],
    layer_names: list[str],
    layout: KVCacheLayout,
) -> tuple[torch.Tensor, PagePool]:
    """View vLLM's cache as one flat pool of head pages, without a copy.

    Args:
        kv_cache_config: vLLM's placement of the layers.
        spec: the spec of the only KV cache group.
        layer_caches: vLLM's view of each layer, ``[B, H, N, 2 * D]``, in ``layer_names`` order.
        layer_names: layer order of ``kv_cache_config``'s tensor.
        layout: the resolved layout.

    Returns:
        ``[num_pages, 2 * block_size * head_dim]`` over the whole buffer, and the arithmetic that
        finds a page in it.

    Raises:
        UnsupportedError: when the buffer is not laid out page by page.
    """
    if layout is not KVCacheLayout.LBHNC or len(kv_cache_config.kv_cache_tensors) != 1:
        raise UnsupportedError(
            f"KV compression needs the KV cache layout LBHNC in one tensor, but vLLM chose "
            f"{layout.name} in {len(kv_cache_config.kv_cache_tensors)}; unset VLLM_KV_CACHE_LAYOUT."
        )
    placement = kv_cache_config.kv_cache_tensors[0]
    if placement.layers != layer_names:
        raise UnsupportedError("KV compression needs every layer in vLLM's one KV cache tensor.")
    first = layer_caches[0]
    num_heads = spec.num_kv_heads
    page_elements = 2 * spec.block_size * spec.head_size
    page_bytes = page_elements * first.element_size()
    strides = (placement.layer_stride, placement.block_stride, placement.offset)
    if any(stride % page_bytes for stride in strides):
        raise UnsupportedError(
            f"KV compression needs whole head pages of {page_bytes} bytes, but vLLM placed layers "
            f"and blocks at strides {strides} bytes; choose another --block-size."
        )
    pool = PagePool(
        num_blocks=kv_cache_config.num_blocks,
        num_layers=len(layer_names),
        num_kv_heads=num_heads,
        first_page=placement.offset // page_bytes,
        layer_stride=placement.layer_stride // page_bytes,
        block_stride=placement.block_stride // page_bytes,
    )
    num_pages = first.untyped_storage().nbytes() // page_bytes
    pages = first.as_strided((num_pages, page_elements), (page_elements, 1), 0)
    for layer, cache in enumerate(layer_caches):
        corner = pages[pool.page_id(layer, 0, 0)]
        if cache.data_ptr() != corner.data_ptr() or not cache[0].is_contiguous():
            raise UnsupportedError(
                f"KV compression found layer {layer_names[layer]} elsewhere than vLLM's cache "
                f"config says; this vLLM version is not supported."
            )
    return pages, pool
