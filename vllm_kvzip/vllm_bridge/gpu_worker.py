"""The worker class that compression puts in place of vLLM's on NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_kvzip.clocks import CudaClock
from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.row_pages import RowPages
from vllm_kvzip.vllm_bridge.gpu_attention import (
    HeadPageBuilder,
    HeadPageFlashBackend,
    HeadPageTritonBackend,
)
from vllm_kvzip.vllm_bridge.kernel_batches import KernelBatcher
from vllm_kvzip.vllm_bridge.kernel_choice import (
    CONTEXT_TOKENS,
    REQUESTS,
    make_up_step,
    vllms_kernel_is_faster,
    warm_up,
)
from vllm_kvzip.vllm_bridge.worker import HeadPageWorker

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.compaction import PageStore
    from vllm_kvzip.vllm_bridge.batches import Batcher
    from vllm_kvzip.vllm_bridge.cache_spec import HeadPageSpec
    from vllm_kvzip.vllm_bridge.head_page_cache import HeadPageCache


class TritonPath(HeadPageWorker):
    """Everything of the GPU's worker but the card: kernels are Triton's."""

    builder_class = HeadPageBuilder
    score_columns = staticmethod(column_maximum)

    def page_store(self, pages: torch.Tensor, spec: HeadPageSpec, builders: list[Any]) -> PageStore:
        """See :class:`HeadPageWorker`; a row holds a token's key and value."""
        return RowPages(pages, spec.block_size, spec.head_size)

    def attach(self, cache: HeadPageCache, builders: list[Any]) -> Batcher:
        """See :class:`HeadPageWorker`; chooses whose kernel attends over compressed prefixes."""
        max_requests = self.scheduler_config.max_num_seqs
        batcher = KernelBatcher(cache, max_requests)
        geometry, num_blocks = cache.geometry, cache.pool.num_blocks
        layer_name = next(iter(cache.layer_index))
        layer = get_layers_from_vllm_config(self.vllm_config, Attention, [layer_name])[layer_name]
        pages = cache.pages.view(-1, 1, geometry.block_size, 2 * geometry.head_dim)
        kernel = self._kvzip_settings.config.attention_kernel
        tokens = min(CONTEXT_TOKENS, self.model_config.max_model_len)
        if kernel != "vllm":
            warm_up(batcher, geometry, layer, num_blocks, tokens)
        if kernel == "auto":
            step = make_up_step(
                batcher, geometry, num_requests=min(REQUESTS, max_requests),
                context_tokens=tokens, num_blocks=num_blocks,
            )  # fmt: skip
            if vllms_kernel_is_faster(step, builders[0], pages, layer, self.clock):
                kernel = "vllm"
        for builder in builders:
            builder.batcher = batcher
            builder.pages = pages if kernel == "vllm" else None
        return batcher


class HeadPageGPUWorker(TritonPath, Worker):
    """vLLM's GPU worker, which compresses prompts between steps."""

    backends: ClassVar = {
        AttentionBackendEnum.FLASH_ATTN: HeadPageFlashBackend,
        AttentionBackendEnum.TRITON_ATTN: HeadPageTritonBackend,
    }
    clock: ClassVar[Clock] = CudaClock()
