"""Scheduler side: what a block manager must know of its group of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.planning.reconstruction import RepeatRule
    from vllm_kvzip.planning.reuse_rule import ReuseRule


@runtime_checkable
class CompressionTerms(Protocol):
    """What the spec of a group of compressed layers says to its block manager.

    A spec of vLLM's has none of it, so ``isinstance`` tells the compressed group from others.

    Attributes:
        rule: what is compressed, into how many blocks.
        reuse: which compressed prefixes later requests start from.
        repeat: how the model repeats contexts, where the scorer wants it.
        metrics_directory: where the engine's metric files go.
    """

    rule: PrefixRule
    reuse: ReuseRule
    repeat: RepeatRule | None
    metrics_directory: str | None

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of the group and all ranks."""
        ...
