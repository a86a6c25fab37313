"""What our metadata builder adds to vLLM's, on every platform."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from vllm_kvzip.vllm_bridge.attention.batches import HeadPageWork
from vllm_kvzip.vllm_bridge.symbols import AttentionMetadataBuilder

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.attention.batches import (
        AttendingBatch,
        SplitBatch,
        StepDescriber,
    )
    from vllm_kvzip.vllm_bridge.symbols import CommonAttentionMetadata


class HeadPageBuilder(AttentionMetadataBuilder):
    """Asks which requests of a batch are compressed, and attaches the answer to vLLM's metadata.

    Attributes:
        describer: set by the worker once the cache exists; until then this is vLLM's builder.
        always_asks: whether the describer is asked even when it has no work.
    """

    describer: StepDescriber | None = None
    always_asks = False

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        """vLLM's metadata as it is when no request of the batch is compressed or observed."""
        describer, common = self.describer, common_attn_metadata
        step = None
        if describer is not None and (describer.has_work or self.always_asks):
            step = describer.describe_step(common)
        if describer is None or step is None:
            return self.vllms_build(common_prefix_len, common, fast_build)
        split = step.split
        if split is None:
            metadata = self.vllms_build(common_prefix_len, common, fast_build)
            return HeadPageWork(observer=describer, spans=step.spans).attach(metadata)
        metadata = self.stock_metadata(common)
        dense, others = None, self.dense_requests(common, split)
        if others is not None:
            dense = self.vllms_build(common_prefix_len, others, fast_build)
        compressed = self.choose_kernel(split.compressed, metadata, common)
        num_tokens = common.num_actual_tokens
        if isinstance(split.dense_tokens, slice):
            num_tokens = split.dense_tokens.start
        work = HeadPageWork(
            observer=describer,
            spans=step.spans,
            compressed=compressed,
            num_tokens=num_tokens,
            dense=dense,
            dense_tokens=split.dense_tokens,
        )
        return work.attach(metadata)

    def vllms_build(self, *args: Any) -> Any:
        """vLLM's own :meth:`build`."""
        return super().build(*args)

    @abstractmethod
    def stock_metadata(self, common: CommonAttentionMetadata) -> Any:
        """vLLM's metadata of a batch, without what only its own kernel needs."""

    @abstractmethod
    def dense_requests(
        self, common: CommonAttentionMetadata, split: SplitBatch
    ) -> CommonAttentionMetadata | None:
        """vLLM's metadata of the requests that are not compressed, as if they were alone.

        Args:
            common: of the whole batch.
            split: names their rows.

        Returns:
            None when there are none.
        """

    def choose_kernel(
        self, compressed: AttendingBatch, metadata: Any, common: CommonAttentionMetadata
    ) -> AttendingBatch:
        """The compressed requests as the kernel takes them that shall serve them.

        Args:
            compressed: as our own kernel takes them.
            metadata: vLLM's, of the whole batch.
            common: what it was made from.
        """
        return compressed
