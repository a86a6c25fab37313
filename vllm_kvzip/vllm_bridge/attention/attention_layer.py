"""What our attention implementation adds to vLLM's, on every platform."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.vllm_bridge.attention.batches import HeadPageWork
from vllm_kvzip.vllm_bridge.fp8_cache import queries_of_model
from vllm_kvzip.vllm_bridge.passes.pass_metadata import PassMetadata
from vllm_kvzip.vllm_bridge.symbols import AttentionImpl

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.attention.attention_timer import AttentionTimer


class HeadPageLayer(AttentionImpl):
    """Serves compressed requests and scoring passes, and times a sample of the steps.

    ``timer`` is set by the worker, on the rank that records metrics.
    """

    attends_over_head_pages = True
    timer: AttentionTimer | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of one layer into ``output``; shapes as in vLLM's implementation."""
        if isinstance(attn_metadata, PassMetadata):
            query = queries_of_model(layer, query, output.dtype)
            attn_metadata.attend(layer, self, query, key, value, output)
            return output
        timer = self.timer if self.timer is not None and self.timer.running is not None else None
        if timer is not None:
            timer.layer_starts()
        scales = (output_scale, output_block_scale)
        self.attend_step(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
        if timer is not None:
            timer.layer_ends()
        return output

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
        """Attention of one layer in one of vLLM's steps; ``output`` is written."""
        work = HeadPageWork.of(attn_metadata)
        if work is not None and work.spans:
            work.observer.observe(layer, query, work.spans, output.dtype)
        if work is None or work.compressed is None:
            self.vllms_forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)
            return
        work.compressed.attend(self, layer, query[: work.num_tokens], output[: work.num_tokens])
        if work.dense is None:
            return
        tokens = work.dense_tokens
        if isinstance(tokens, slice):
            dense_output = output[tokens]
            self.vllms_forward(layer, query[tokens], key, value, kv_cache, work.dense, dense_output)
            return
        dense_query = query[tokens]
        dense_output = torch.empty_like(output[: len(dense_query)])
        self.vllms_forward(layer, dense_query, key, value, kv_cache, work.dense, dense_output)
        output[tokens] = dense_output

    def vllms_forward(self, *args: Any) -> None:
        """vLLM's own :meth:`forward`."""
        super().forward(*args)
