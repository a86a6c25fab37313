"""Which of vLLM's attention backends a GPU gets when the user names none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.model.attention_kinds import has_sinks
from vllm_kvzip.vllm_bridge.fp8_cache import running_cache_dtype
from vllm_kvzip.vllm_bridge.symbols import current_platform

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import AttentionBackendEnum, VllmConfig


def default_gpu_backend(vllm_config: VllmConfig) -> AttentionBackendEnum:
    """FlashAttention where it runs; else vLLM's Triton attention, which runs everywhere."""
    from vllm_kvzip.vllm_bridge.symbols import (
        AttentionBackendEnum,
        FlashAttentionBackend,
        is_flash_attn_varlen_func_available,
        set_current_vllm_config,
    )

    model = vllm_config.model_config
    capability = current_platform.get_device_capability()
    own_pages = capability is not None and capability.major >= 10 and model.get_head_size() == 256
    flash = (
        is_flash_attn_varlen_func_available()
        and capability is not None
        and not own_pages  # FlashAttention 4 has a page size of its own there
        and FlashAttentionBackend.supports_compute_capability(capability)
        and FlashAttentionBackend.supports_dtype(model.dtype)
        and FlashAttentionBackend.supports_head_size(model.get_head_size())
    )
    if flash:
        with set_current_vllm_config(vllm_config):  # it may name a version of FlashAttention
            refusal = FlashAttentionBackend.supports_combination(
                head_size=model.get_head_size(),
                dtype=model.dtype,
                kv_cache_dtype=running_cache_dtype(vllm_config),
                block_size=vllm_config.cache_config.block_size,
                use_mla=False,
                has_sink=has_sinks(model.hf_text_config),
                use_sparse=False,
                use_mm_prefix=False,
                device_capability=capability,
            )
        flash = refusal is None
    return AttentionBackendEnum.FLASH_ATTN if flash else AttentionBackendEnum.TRITON_ATTN
