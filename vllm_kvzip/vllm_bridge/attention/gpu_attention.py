"""Attention on GPUs over head pages: vLLM's FlashAttention or Triton backend, and what we add.

A batch without a compressed request takes vLLM's path. In a mixed batch the requests up to the last
compressed one are served over head pages, the rest, which are in prefill, by vLLM's kernel.
Inside a full CUDA graph there is no such choice, because it is captured once: there our kernel
serves every request of a decode step, compressed or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from vllm_kvzip.vllm_bridge.attention import stock_head_sequences
from vllm_kvzip.vllm_bridge.attention.attention_layer import HeadPageLayer
from vllm_kvzip.vllm_bridge.attention.batches import HeadPageWork
from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatch
from vllm_kvzip.vllm_bridge.attention.metadata_builder import HeadPageBuilder
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_attention
from vllm_kvzip.vllm_bridge.settings import KEY, Settings
from vllm_kvzip.vllm_bridge.symbols import (
    AttentionCGSupport,
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
    KVCacheLayout,
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.vllm_bridge.attention.batches import AttendingBatch, SplitBatch
    from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatcher
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata, KVCacheSpec, VllmConfig


class HeadPageGPUBuilder(HeadPageBuilder):
    """What our metadata builder adds to vLLM's on GPUs.

    A full CUDA graph reads from buffers which request is in which row. The describer writes them,
    so with such graphs it is asked in every step.

    Attributes:
        batcher: set by the worker once the cache exists.
        pages: the pool as vLLM's kernel wants a cache, when that kernel serves compressed
            requests; None: ours does.
    """

    batcher: KernelBatcher | None = None
    pages: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mode = self.vllm_config.compilation_config.cudagraph_mode
        self.always_asks = mode is not None and mode.has_full_cudagraphs()
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)  # prefills come last
        # vLLM would go on with a draft's metadata of the step before, and our part would not know.
        self.supports_draft_decode_metadata_update = False

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        """Full graphs of decode steps, unless a scorer watches queries.

        A full graph replays kernels and runs no Python, and a prompt's last token can be computed
        in a decode step, where its query would not be seen.
        """
        if KEY not in (vllm_config.additional_config or {}):  # a later engine of this process
            support: AttentionCGSupport = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return support
        if Settings.from_vllm_config(vllm_config).observation_tokens:
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_BATCH

    def stock_metadata(self, common: CommonAttentionMetadata) -> Any:
        """See :class:`HeadPageBuilder`."""
        return self.vllms_build(0, common, True)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Metadata of a decode step in which our kernel serves every request."""
        stock = super().build_for_cudagraph_capture(common_attn_metadata)
        if self.describer is None or self.batcher is None:
            return stock
        common = common_attn_metadata
        work = HeadPageWork(
            observer=self.describer,
            compressed=self.batcher.batch(common, common.num_reqs, common.max_query_len),
            num_tokens=common.num_actual_tokens,
        )
        return work.attach(stock)

    def dense_requests(
        self, common: CommonAttentionMetadata, split: SplitBatch
    ) -> CommonAttentionMetadata | None:
        """See :class:`HeadPageBuilder`; they are the last ones, or nothing but padding."""
        rows, tokens = split.dense_rows, split.dense_tokens
        if not isinstance(rows, slice) or not isinstance(tokens, slice):
            return None
        if tokens.start >= int(common.query_start_loc_cpu[-1]):
            return None
        return _last_requests(common, rows.start, tokens.start)

    def choose_kernel(
        self, compressed: AttendingBatch, metadata: Any, common: CommonAttentionMetadata
    ) -> AttendingBatch:
        """See :class:`HeadPageBuilder`; vLLM's kernel where it is faster."""
        if (
            self.pages is not None
            and isinstance(compressed, KernelBatch)
            and stock_head_sequences.fits(compressed)
        ):
            return stock_head_sequences.StockHeadSequences(compressed, self.pages, metadata, common)
        return compressed


class HeadPageGPUImpl(HeadPageLayer):
    """What our attention implementation adds to vLLM's on GPUs."""

    _of_sequences: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_attention(self)

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: over head pages the output is written as it is."""
        return False

    def attend_over_head_sequences(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """vLLM's kernel over head sequences; see :mod:`.stock_head_sequences`.

        Args:
            layer: vLLM's attention layer.
            query: ``[rows, G, D]``, one row for each token of each head sequence.
            pages: ``[num_pages, 1, N, 2 * D]``.
            metadata: vLLM's, of the head sequences.
            output: like ``query``; written.
        """
        if self._of_sequences is None:
            self._of_sequences = stock_head_sequences.one_kv_head(self)
        self._of_sequences.vllms_forward(layer, query, query, query, pages, metadata, output)


class HeadPageFlashBuilder(HeadPageGPUBuilder, FlashAttentionMetadataBuilder):
    """For FlashAttention."""


class HeadPageFlashImpl(HeadPageGPUImpl, FlashAttentionImpl):
    """For FlashAttention."""


class HeadPageFlashBackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend with a builder and an implementation that know head pages."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> list[KVCacheLayout]:
        """A head page must be one run of memory."""
        return [KVCacheLayout.LBHNC]

    @staticmethod
    def get_impl_cls() -> type[HeadPageFlashImpl]:
        return HeadPageFlashImpl

    @staticmethod
    def get_builder_cls() -> type[HeadPageFlashBuilder]:
        return HeadPageFlashBuilder


class HeadPageTritonBuilder(HeadPageGPUBuilder, TritonAttentionMetadataBuilder):
    """For vLLM's Triton attention."""


class HeadPageTritonImpl(HeadPageGPUImpl, TritonAttentionImpl):
    """For vLLM's Triton attention."""


class HeadPageTritonBackend(TritonAttentionBackend):
    """vLLM's Triton backend with a builder and an implementation that know head pages."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> list[KVCacheLayout]:
        """A head page must be one run of memory."""
        return [KVCacheLayout.LBHNC]

    @staticmethod
    def get_impl_cls() -> type[HeadPageTritonImpl]:
        return HeadPageTritonImpl

    @staticmethod
    def get_builder_cls() -> type[HeadPageTritonBuilder]:
        return HeadPageTritonBuilder


def _last_requests(
    common: CommonAttentionMetadata, first_row: int, first_token: int
) -> CommonAttentionMetadata:
    """The metadata of the last requests of a batch, as if they were alone."""
    starts_cpu = common.query_start_loc_cpu[first_row:] - first_token
    rows = slice(first_row, None)
    optional = {
        name: value[rows]
        for name in ("seq_lens_cpu_upper_bound", "is_prefilling", "req_idx")
        if (value := getattr(common, name)) is not None
    }
    return replace(
        common,
        query_start_loc=common.query_start_loc[rows] - first_token,
        query_start_loc_cpu=starts_cpu,
        seq_lens=common.seq_lens[rows],
        num_reqs=common.num_reqs - first_row,
        num_actual_tokens=common.num_actual_tokens - first_token,
        max_query_len=int(starts_cpu.diff().max()),
        block_table_tensor=common.block_table_tensor[rows],
        slot_mapping=common.slot_mapping[first_token:],
        positions=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **optional,
    )
