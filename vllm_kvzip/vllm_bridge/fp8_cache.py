"""vLLM's cache of 8-bit floating-point numbers (``--kv-cache-dtype fp8``): its scales, its queries.

vLLM keeps the scales of a layer in tensors of one number or one for each KV head. Where its own
kernel wants queries in 8 bits too, the layer hands them to the attention implementation like that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.storage.stored_scales import StoredScales
from vllm_kvzip.vllm_bridge.symbols import current_platform

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

FP8_CACHES = ("fp8", "fp8_e4m3")
"""Names of vLLM's for the same format."""
FP8_CAPABILITY = 89
"""Of the first cards that read it."""


def running_cache_dtype(vllm_config: VllmConfig) -> str:
    """vLLM's name of the KV cache's dtype, as its layers will have it.

    A checkpoint of compressed-tensors can ask for a cache of 8 bits. vLLM learns of it when it
    builds the layers, unless the user named a dtype.
    """
    dtype: str = vllm_config.cache_config.cache_dtype
    asks = getattr(vllm_config.quant_config, "kv_cache_scheme", None) is not None
    return FP8_CACHES[0] if dtype == "auto" and asks else dtype


def read_scales(
    layers: Sequence[Any], num_kv_heads: int, dtype: torch.dtype
) -> StoredScales | None:
    """Scales of a cache, once the model is loaded; None where numbers are stored as they are.

    Args:
        layers: vLLM's attention layers.
        num_kv_heads: H of this worker.
        dtype: of the model.
    """
    if layers[0].kv_cache_dtype not in FP8_CACHES:
        return None
    quantized_queries = layers[0].query_quant is not None
    stored = current_platform.fp8_dtype()
    factors = [
        [_by_head(layer._q_scale, num_kv_heads) for layer in layers],
        [_by_head(layer._k_scale, num_kv_heads) for layer in layers],
        [_by_head(layer._v_scale, num_kv_heads) for layer in layers],
    ]
    if not quantized_queries:
        factors[0] = [torch.ones_like(scale) for scale in factors[0]]
    return StoredScales(
        stored=stored,
        dtype=dtype,
        query_dtype=stored if quantized_queries else dtype,
        factors=torch.stack([torch.stack(kind) for kind in factors]),
    )


def queries_of_model(layer: Any, query: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Queries as numbers of the model, whatever the layer handed over.

    Args:
        layer: vLLM's attention layer.
        query: ``[num_tokens, H * G, D]``.
        dtype: of the model.
    """
    if query.dtype is dtype:
        return query
    by_head = query.to(torch.float32).unflatten(1, (layer.num_kv_heads, -1))
    return (by_head * layer._q_scale.view(-1, 1, 1)).flatten(1, 2).to(dtype)


def _by_head(scale: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """A scale, or one for each KV head, as float32 ``[H]``."""
    return scale.detach().float().view(-1).expand(num_kv_heads)
