"""Attention on GPUs over head pages: vLLM's FlashAttention or Triton backend, and what we add.

A batch without a compressed request takes vLLM's path. In a mixed batch the requests up to the last
compressed one are served over head pages, those behind it, which are in prefill, by vLLM's kernel.
Inside a full CUDA graph there is no such choice, because it is captured once: there our kernel
serves every request of a decode step, compressed or not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_kvzip.vllm_bridge.attention import stock_pairs
from vllm_kvzip.vllm_bridge.attention.attention_layer import HeadPageLayer
from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatch
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_attention
from vllm_kvzip.vllm_bridge.settings import KEY, Settings
from vllm_kvzip.vllm_bridge.symbols import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
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

    from vllm_kvzip.vllm_bridge.attention.batches import AttendingBatch, QuerySpan, StepDescriber
    from vllm_kvzip.vllm_bridge.attention.kernel_batches import KernelBatcher
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata, KVCacheSpec, VllmConfig

_STEP = "kvzip_step"  # attribute of vLLM's metadata that holds ours


@dataclass(frozen=True)
class HeadPageStep:
    """What a step does beyond vLLM's metadata.

    Attributes:
        pairs: requests that are served over head pages; None when vLLM's kernel serves all.
        num_tokens: tokens of ``pairs``, the first of the batch.
        rest: vLLM's metadata of the requests behind them; None when there are none.
        spans: queries to hand to the scorer.
        runtime: where they go.
    """

    pairs: AttendingBatch | None
    num_tokens: int
    rest: Any
    spans: tuple[QuerySpan, ...]
    runtime: StepDescriber


class HeadPageBuilder(AttentionMetadataBuilder):
    """In front of vLLM's metadata builder.

    Attributes:
        runtime, batcher: set by the worker once the cache exists; until then this is vLLM's.
        pages: the pool as vLLM's kernel wants a cache, when that kernel shall attend over pairs;
            None: ours does.
    """

    runtime: StepDescriber | None = None
    batcher: KernelBatcher | None = None
    pages: torch.Tensor | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mode = self.vllm_config.compilation_config.cudagraph_mode
        self._full_graphs = mode is not None and mode.has_full_cudagraphs()
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)  # prefills come last

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
        """vLLM's metadata of a batch, without what only its own kernel needs ahead."""
        return super().build(0, common, True)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        """Metadata of a decode step in which our kernel serves every request."""
        stock = super().build_for_cudagraph_capture(common_attn_metadata)
        if self.runtime is None or self.batcher is None:
            return stock
        common = common_attn_metadata
        pairs = self.batcher.batch(common, common.num_reqs, common.max_query_len)
        step = HeadPageStep(pairs, common.num_actual_tokens, None, (), self.runtime)
        return _with_step(stock, step)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """vLLM's metadata as it is when no request of the batch is compressed or observed."""
        runtime, common = self.runtime, common_attn_metadata
        step = None
        if runtime is not None and (runtime.has_work or self._full_graphs):
            step = runtime.describe_step(common)  # also tells a full graph who is in which row
        if runtime is None or step is None:
            return super().build(common_prefix_len, common, fast_build)
        batch = step.batch
        if batch is None:
            stock = super().build(common_prefix_len, common, fast_build)
            return _with_step(stock, HeadPageStep(None, 0, None, step.spans, runtime))
        stock = self.stock_metadata(common)
        rest, first_row, num_tokens = None, 0, common.num_actual_tokens
        if isinstance(batch.dense_rows, slice) and isinstance(batch.dense_tokens, slice):
            first_row, num_tokens = batch.dense_rows.start, batch.dense_tokens.start
        if num_tokens < int(common.query_start_loc_cpu[-1]):  # behind is more than padding
            others = _behind(common, first_row, num_tokens)
            rest = super().build(common_prefix_len, others, fast_build)
        pairs = batch.pairs
        if self.pages is not None and isinstance(pairs, KernelBatch) and stock_pairs.fits(pairs):
            pairs = stock_pairs.StockPairs(pairs, self.pages, stock, common)
        return _with_step(stock, HeadPageStep(pairs, num_tokens, rest, step.spans, runtime))


class HeadPageImpl(HeadPageLayer):
    """In front of vLLM's attention implementation."""

    _pairs: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_attention(self, is_capped=bool(self.logits_soft_cap))

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        """No: over head pages the output is written as it is."""
        return False

    def attend_step(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        *scales: torch.Tensor | None,
    ) -> None:
        """See :class:`HeadPageLayer`."""
        step: HeadPageStep | None = getattr(attn_metadata, _STEP, None)
        if step is not None and step.spans:
            step.runtime.observe(layer, query, step.spans, output.dtype)
        if step is None or step.pairs is None:
            self.vllms_forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return
        first = step.num_tokens
        step.pairs.attend(self, layer, query[:first], output[:first])
        if step.rest is not None:
            self.vllms_forward(
                layer, query[first:], key, value, kv_cache, step.rest, output[first:]
            )

    def attend_over_pairs(
        self,
        layer: Any,
        query: torch.Tensor,
        pages: torch.Tensor,
        metadata: Any,
        output: torch.Tensor,
    ) -> None:
        """vLLM's kernel over (request, KV head) pairs; see :mod:`.stock_pairs`.

        Args:
            layer: vLLM's attention layer.
            query: ``[pair rows, G, D]``.
            pages: ``[num_pages, 1, N, 2 * D]``.
            metadata: vLLM's, of the pairs.
            output: like ``query``; written.
        """
        if self._pairs is None:
            self._pairs = stock_pairs.one_kv_head(self)
        self._pairs.vllms_forward(layer, query, query, query, pages, metadata, output)


class HeadPageFlashBuilder(HeadPageBuilder, FlashAttentionMetadataBuilder):
    """For FlashAttention."""


class HeadPageFlashImpl(HeadPageImpl, FlashAttentionImpl):
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


class HeadPageTritonBuilder(HeadPageBuilder, TritonAttentionMetadataBuilder):
    """For vLLM's Triton attention."""


class HeadPageTritonImpl(HeadPageImpl, TritonAttentionImpl):
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


def _with_step(stock: Any, step: HeadPageStep) -> Any:
    """vLLM's metadata with ours; its class differs from backend to backend."""
    setattr(stock, _STEP, step)
    return stock


def _behind(
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
