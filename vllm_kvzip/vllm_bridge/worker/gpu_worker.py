"""The worker class that compression puts in place of vLLM's on NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvzip.clocks import CudaClock
from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.model.key_transform import num_first
from vllm_kvzip.scoring import scorer_class
from vllm_kvzip.storage.row_pages import PAGES_AT_ONCE, RowPages
from vllm_kvzip.vllm_bridge.attention.gpu_attention import (
    HeadPageFlashBackend,
    HeadPageTritonBackend,
)
from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatcher
from vllm_kvzip.vllm_bridge.attention.kernel_choice import (
    CONTEXT_TOKENS,
    REQUESTS,
    make_sample_batch,
    vllms_kernel_is_faster,
    warm_up,
)
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_sinks
from vllm_kvzip.vllm_bridge.drafts import num_draft_layers
from vllm_kvzip.vllm_bridge.fingerprint import rows_of_stages
from vllm_kvzip.vllm_bridge.settings import cache_shape
from vllm_kvzip.vllm_bridge.symbols import (
    Attention,
    AttentionBackendEnum,
    get_layers_from_vllm_config,
    get_pp_group,
    init_logger,
)
from vllm_kvzip.vllm_bridge.symbols import GPUWorker as Worker
from vllm_kvzip.vllm_bridge.worker.worker import HeadPageWorker

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.core import CacheGeometry
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.storage.stored_scales import StoredScales
    from vllm_kvzip.vllm_bridge.attention.batches import Batcher
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache


SELECT_BYTES = 56
"""Of each (layer, KV head, token): scores, their order, and what is kept, at their peak."""
ROUND_BYTES = 8
"""The same where rounds score everything anew: the pair's position, and whether it is one."""
TIER_BYTES = 32
"""The same of the order and the sums from which a second tier is chosen."""
ROTATION_COPIES = 6
"""How often quantized tokens exist in float32 while they are transformed and rotated."""
LAYER_BYTES = 20
"""Of each number of one layer's keys while they are scored: keys, values, and three times as much
as either. Scorers work in parts, so this does not grow with the query group."""

logger = init_logger("vllm." + __name__)


def compression_bytes(
    num_layers: int,
    num_kv_heads: int,
    head_dim: int,
    num_tokens: int,
    page_tokens: int = 0,
    scores_anew: bool = False,
) -> int:
    """Bytes that compressing one prompt takes beside the KV cache, at most.

    Args:
        num_layers, num_kv_heads, head_dim: L, H of this worker, D.
        num_tokens: of the prompt.
        page_tokens: of a quantized page; 0 where there is none.
        scores_anew: whether rounds score what was kept anew.
    """
    of_kv_pair = SELECT_BYTES + (TIER_BYTES if page_tokens else 0)
    of_kv_pair += ROUND_BYTES if scores_anew else 0
    at_once = 4 * ROTATION_COPIES * PAGES_AT_ONCE * page_tokens * head_dim
    return num_kv_heads * num_tokens * (num_layers * of_kv_pair + head_dim * LAYER_BYTES) + at_once


def observation_bytes(
    num_layers: int, num_query_heads: int, head_dim: int, num_tokens: int, itemsize: int
) -> int:
    """Bytes of queries that are kept for a scorer until their prompts are compressed.

    Args:
        num_layers, num_query_heads, head_dim: L, H * G of this worker, D.
        num_tokens: whose queries are kept at once.
        itemsize: bytes of a number.
    """
    # As steps left them, and joined for the prompt that is compressed; one layer in float32.
    return num_query_heads * head_dim * num_tokens * (2 * num_layers * itemsize + 4)


def transform_bytes(max_requests: int, num_heads: int, head_dim: int, num_first: int) -> int:
    """Bytes of what quantized keys were freed of, which kernels read from buffers by request.

    Args:
        max_requests: most requests of a batch; one more slot is for requests without a prefix.
        num_heads: L * H of this worker, of all its layers.
        head_dim: D.
        num_first: W, first tokens with a mean of their own.
    """
    return (2 + num_first) * 4 * (1 + max_requests) * num_heads * head_dim


class TritonPath(HeadPageWorker):
    """All of the GPU's worker that does not need a card; its kernels are Triton's."""

    score_columns = staticmethod(column_maximum)

    def determine_available_memory(self) -> int:
        """vLLM's figure without what compressing the longest prompt takes for a moment.

        Unless the user named the bytes of the KV cache; they are kept then.
        """
        available = int(super().determine_available_memory())
        if self.cache_config.kv_cache_memory_bytes is not None:
            return available
        model, parallel = self.model_config, self.parallel_config
        quantization = self.kvzip_settings.quantization(*cache_shape(self.vllm_config))
        rows = rows_of_stages(self.vllm_config)[get_pp_group().rank_in_group]
        num_layers = rows.stop - rows.start
        needed = compression_bytes(
            num_layers,
            model.get_num_kv_heads(parallel),
            model.get_head_size(),
            model.max_model_len,
            quantization.layout.page_tokens if quantization else 0,
            scorer_class(self.kvzip_settings.scorer).rescores_kept,
        )
        if quantization is not None:
            num_heads = num_layers + num_draft_layers(self.vllm_config)
            num_heads *= model.get_num_kv_heads(parallel)
            needed += transform_bytes(
                self.scheduler_config.max_num_seqs,
                num_heads,
                model.get_head_size(),
                num_first(self.kvzip_settings.config.sink_tokens),
            )
        if window := self.kvzip_settings.observation_tokens:
            scheduling, config = self.scheduler_config, self.kvzip_settings.config
            most = scheduling.max_num_seqs * window
            if config.decode_budget is None and config.prefill_budget is None:
                most = min(scheduling.max_num_batched_tokens, most)
            needed += observation_bytes(
                num_layers,
                model.get_num_attention_heads(parallel),
                model.get_head_size(),
                most,
                model.dtype.itemsize,
            )
        logger.info("KV compression sets %.2f GiB aside for its own tensors.", needed / 2**30)
        return max(0, available - needed)

    def page_store(
        self,
        pages: torch.Tensor,
        geometry: CacheGeometry,
        builders: list[Any],
        quantization: Quantization | None,
        scales: StoredScales | None,
    ) -> PageStore:
        """See :class:`HeadPageWorker`; a row holds a token's key and value."""
        return RowPages(pages, geometry.page_tokens, geometry.head_dim, quantization, scales)

    def attach(self, cache: HeadPageCache, builders: list[Any]) -> Batcher:
        """See :class:`HeadPageWorker`; chooses whose kernel attends over compressed prefixes."""
        max_requests = self.scheduler_config.max_num_seqs
        batcher = KernelBatcher(cache, max_requests)
        geometry, num_blocks = cache.geometry, cache.pool.num_blocks
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, list(cache.layer_index))
        layer = layers[next(iter(cache.layer_index))]
        has_sinks = any(some.impl.sinks is not None for some in layers.values())
        pages = cache.pages.view(-1, 1, geometry.page_tokens, 2 * geometry.head_dim)
        kernel = self.kvzip_settings.config.attention_kernel
        check_sinks(has_sinks, kernel)
        tokens = min(CONTEXT_TOKENS, self.model_config.max_model_len)
        warm_up(batcher, geometry, layer, num_blocks, tokens)
        ours_alone = has_sinks or batcher.quantized is not None or cache.scales is not None
        if kernel == "auto" and not ours_alone:
            sample = make_sample_batch(
                batcher, geometry, num_requests=min(REQUESTS, max_requests),
                context_tokens=tokens, num_blocks=num_blocks,
            )  # fmt: skip
            if vllms_kernel_is_faster(sample, builders[0], pages, layer, self.clock):
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
