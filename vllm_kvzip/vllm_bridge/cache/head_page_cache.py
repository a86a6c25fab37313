"""vLLM's KV cache of the compressed layers, seen as one pool of head pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.core import CacheGeometry
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.storage.head_pages import PagePool
    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.storage.stored_scales import StoredScales


@dataclass(frozen=True)
class HeadPageCache:
    """One worker's part of it.

    Attributes:
        geometry: shape of the compressed layers.
        pool: tells where head pages are.
        pages: ``[num_pages, 2 * N * D]``, vLLM's cache without a copy.
        store: reads and compacts them.
        layer_index: vLLM's layer name -> layer.
        quantization: how quantized pages are written; None where there are none.
        scales: of a cache of 8-bit numbers; None where numbers are stored as they are.
        num_first: how many of a prompt's first tokens have quantized keys that lose nothing.
    """

    geometry: CacheGeometry
    pool: PagePool
    pages: torch.Tensor
    store: PageStore
    layer_index: dict[str, int]
    quantization: Quantization | None = None
    scales: StoredScales | None = None
    num_first: int = 0
