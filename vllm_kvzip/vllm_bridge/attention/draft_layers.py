"""Layers of a draft model, for speculative decoding, among the compressed ones.

vLLM gives a draft model's layers the block table of the target's layers, and a part of each block.
So a compressed request has its compressed row there too. A draft's layers keep every KV pair of a
prefix, in the order of their tokens: what is compressed can then not make its guesses worse, but
for what the target's hidden states tell it. They are never scored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.vllm_bridge.attention.batches import StepDescription

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from vllm_kvzip.vllm_bridge.attention.batches import PrefixState, QuerySpan, SplitBatch
    from vllm_kvzip.vllm_bridge.symbols import (
        CommonAttentionMetadata,
        GPUModelRunner,
        GPUModelRunnerV2,
    )


def draft_layer_names(runner: GPUModelRunner | GPUModelRunnerV2) -> frozenset[str]:
    """vLLM's names of the draft model's layers that have a KV cache, once it is loaded.

    Args:
        runner: vLLM's model runner.
    """
    if (speculator := getattr(runner, "speculator", None)) is not None:  # V2's
        return frozenset(getattr(speculator, "draft_attn_layer_names", ()))
    drafter = getattr(runner, "drafter", None)
    return frozenset(getattr(drafter, "_draft_attn_layer_names", ()))


def draft_builders(runner: GPUModelRunner | GPUModelRunnerV2) -> list[Any]:
    """vLLM's metadata builders of the draft model, which are others than the target's.

    In runner V2 they serve a draft's steps after the first; in the first one an EAGLE head or MTP
    layer reads the metadata that the target's builders made.

    Args:
        runner: vLLM's model runner.
    """
    if (speculator := getattr(runner, "speculator", None)) is not None:
        by_cache_group = getattr(speculator, "attn_groups", ())
    else:
        by_cache_group = (getattr(getattr(runner, "drafter", None), "draft_attn_groups", ()),)
    return [
        builder
        for groups in by_cache_group
        for group in groups
        for builder in group.metadata_builders
    ]


class DraftDescriber:
    """Tells the draft model's builders which requests are compressed.

    A scorer never sees a draft's queries. And a draft runs several times in a step, each time with
    other rows than the target had.

    Args:
        states: of compressed requests, by id.
        split: splits a batch into compressed and other requests.
    """

    def __init__(
        self,
        states: Mapping[str, PrefixState],
        split: Callable[[CommonAttentionMetadata], SplitBatch | None],
    ) -> None:
        self._states = states
        self._split = split

    @property
    def has_work(self) -> bool:
        """Whether any request is compressed."""
        return bool(self._states)

    def describe_step(self, common: CommonAttentionMetadata) -> StepDescription | None:
        """See :class:`~vllm_kvzip.vllm_bridge.attention.batches.StepDescriber`."""
        split = self._split(common)
        return None if split is None else StepDescription(split, ())

    def observe(
        self, layer: Any, query: torch.Tensor, spans: tuple[QuerySpan, ...], dtype: torch.dtype
    ) -> None:
        """Nothing: its descriptions name no spans."""
