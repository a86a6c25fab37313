"""Scheduler side: the KV cache spec of compressed layers and the block manager that frees blocks.

The block table row of a request goes through three shapes::

    prefill      [prompt blocks ...]
    crossing     [prompt blocks ...][n' reserved blocks]      the step that completes the prompt
    folded       [n' compressed][null ...][dense tail ...]    from the next step on

In the folded row the block of logical index ``i`` is again at ``row[i]`` for every dense token, so
vLLM's slot mapping, block accounting and prefix caching go on unchanged; the dead entries between
the compressed blocks and the tail are the null block. The prompt's blocks are returned to the pool
in the fold. They are never written to, so they stay valid in the prefix cache until reused.

Importing this module registers the spec and its manager with vLLM. The spec is pickled from the
workers to the engine core, so the import happens exactly where compression is on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self, TypeVar

from vllm.utils.math_utils import cdiv
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec, replace_as
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvzip.head_pages import PrefixRule
from vllm_kvzip.vllm_bridge.stats_export import SchedulerRecorder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.request import Request

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.settings import Settings

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class HeadPageSpec(FullAttentionSpec):
    """Full attention whose prompt prefix is compressed into head pages after prefill.

    ``max_compressed_blocks`` sizes the extra room of the crossing step; ``num_layers`` is the
    number of layers in the KV cache group, which the manager needs to count bytes.
    """

    keep_ratio: float = 1.0
    min_prompt_tokens: int = 0
    sink_tokens: int = 0
    recent_tokens: int = 0
    num_layers: int = 0
    metrics_directory: str | None = None

    @classmethod
    def from_full_attention(
        cls, spec: FullAttentionSpec, settings: Settings, num_layers: int
    ) -> HeadPageSpec:
        """The same layer cache as ``spec``, with the compression rule of ``settings``."""
        config = settings.config
        return replace_as(
            spec,
            cls,
            keep_ratio=config.keep_ratio,
            min_prompt_tokens=config.min_prompt_tokens,
            sink_tokens=config.sink_tokens,
            recent_tokens=config.recent_tokens,
            num_layers=num_layers,
            metrics_directory=settings.metrics_directory,
        )

    @property
    def rule(self) -> PrefixRule:
        """What follows from a prompt's length alone; the workers use the same rule."""
        return PrefixRule(
            keep_ratio=self.keep_ratio,
            min_prompt_tokens=self.min_prompt_tokens,
            sink_tokens=self.sink_tokens,
            recent_tokens=self.recent_tokens,
            block_size=self.block_size,
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of the group."""
        return int(self.page_size_bytes) * self.num_layers

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a group; vLLM's merge drops fields it does not know."""
        merged = super().merge(specs)
        first = specs[0]
        return replace(
            merged,
            keep_ratio=first.keep_ratio,
            min_prompt_tokens=first.min_prompt_tokens,
            sink_tokens=first.sink_tokens,
            recent_tokens=first.recent_tokens,
            num_layers=first.num_layers,
            metrics_directory=first.metrics_directory,
        )

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Width of a block table row in blocks: the crossing step holds prompt and reserve."""
        width: int = super().max_num_blocks_per_req(vllm_config, max_len)
        return width + self.rule.max_compressed_blocks(max_len)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes one layer needs for the longest request at its peak, the crossing step."""
        max_len = vllm_config.model_config.max_model_len
        num_blocks = cdiv(max_len, self.block_size) + self.rule.max_compressed_blocks(max_len)
        return int(num_blocks * self.page_size_bytes)


@dataclass(frozen=True)
class Reservation:
    """Reserved blocks inside a row that is not folded yet: ``row[start : start + count]``."""

    start: int
    count: int


class HeadPageManager(FullAttentionManager):
    """Block manager of one group of compressed layers.

    Everything follows from the prompt length (:class:`PrefixRule`), which vLLM hands over in
    ``remove_skipped_blocks`` before it asks for blocks, so scheduler and workers agree without a
    message.
    """

    def __init__(self, kv_cache_spec: HeadPageSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._rule = kv_cache_spec.rule
        self._block_bytes = kv_cache_spec.block_bytes
        self._recorder = SchedulerRecorder(kv_cache_spec.metrics_directory)
        self._prompt_tokens: dict[str, int] = {}
        self._plans: dict[str, PrefixPlan] = {}
        self._reserved: dict[str, Reservation] = {}
        self._blocks_saved: dict[str, int] = {}

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Learn the prompt length; once the prompt is processed, fold the row and free blocks."""
        if num_prompt_tokens is None:
            return
        if request_id not in self._prompt_tokens:
            self._prompt_tokens[request_id] = num_prompt_tokens
            plan = self._rule.plan(num_prompt_tokens)
            if plan is not None:
                self._plans[request_id] = plan
            else:
                reason = self._rule.skip_reason(num_prompt_tokens)
                self._recorder.skipped(reason or "unknown")
        if request_id in self._reserved and processed_computed_tokens >= num_prompt_tokens:
            self._fold(request_id)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        **kwargs: Any,
    ) -> int:
        """vLLM's count plus the blocks that hold, or are about to hold, the compressed prefix."""
        extra = self._extra_row_blocks(request_id, num_tokens_main_model)
        count: int = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens + extra * self.block_size,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            **kwargs,
        )
        return count

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """Blocks for the next tokens; in the crossing step the reserve follows them in the row."""
        if reservation := self._reserved.get(request_id):
            num_tokens += reservation.count * self.block_size
            return list(super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model))
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        count = self._extra_row_blocks(request_id, num_tokens_main_model)
        if count == 0:
            return list(new_blocks)
        reserve = self.block_pool.get_new_blocks(count)
        row = self.req_to_blocks[request_id]
        self._reserved[request_id] = Reservation(start=len(row), count=count)
        row.extend(reserve)
        return [*new_blocks, *reserve]

    def cache_blocks(self, request: Request, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """Publish raw prompt blocks only: what follows was computed over a compressed prefix."""
        if request.request_id in self._plans:
            num_tokens = min(num_tokens, request.num_prompt_tokens)
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Forget the request (end, abort or preemption) and hand over all of its blocks."""
        self._prompt_tokens.pop(request_id, None)
        self._plans.pop(request_id, None)
        if self._reserved.pop(request_id, None) is not None:
            self._recorder.skipped("ended_before_decode")
        if saved := self._blocks_saved.pop(request_id, 0):
            self._recorder.released(saved * self._block_bytes)
        return list(super().pop_blocks_for_free(request_id))

    def _extra_row_blocks(self, request_id: str, num_tokens_main_model: int) -> int:
        """Blocks in the row beyond vLLM's own count once ``num_tokens_main_model`` are computed."""
        if request_id in self._blocks_saved:
            return 0
        if reservation := self._reserved.get(request_id):
            return reservation.count
        if request_id in self._prompt_tokens:
            plan = self._plans.get(request_id)
            num_prompt_tokens = self._prompt_tokens[request_id]
        else:
            # vLLM's admission check asks for the whole request before it tells the prompt's length;
            # a resumed request counts its own output here, which errs on the safe side.
            num_prompt_tokens = num_tokens_main_model
            plan = self._rule.plan(num_prompt_tokens)
        if plan is None or num_tokens_main_model < num_prompt_tokens:
            return 0
        return plan.num_compressed_blocks

    def _fold(self, request_id: str) -> None:
        reservation = self._reserved.pop(request_id)
        plan = self._plans[request_id]
        row = self.req_to_blocks[request_id]
        raw_prefix = row[: plan.num_prefix_blocks]
        row[:] = fold_row(row, plan, reservation.start, self._null_block)
        self.block_pool.free_blocks(reversed(raw_prefix))
        saved = plan.num_prefix_blocks - plan.num_compressed_blocks
        self._blocks_saved[request_id] = saved
        self._recorder.compressed(
            plan,
            self._prompt_tokens[request_id],
            self._rule.block_size,
            saved * self._block_bytes,
        )


def fold_row(row: Sequence[T], plan: PrefixPlan, reserve_start: int, null: T) -> list[T]:
    """The folded form of a crossing row: ``[compressed][null ...][dense tail ...]``.

    ``row`` is ``[prompt][reserve][blocks allocated since]`` with the reserve at ``reserve_start``.
    The result's length is the row's length without the reserve, that is vLLM's logical length.
    """
    count = plan.num_compressed_blocks
    compressed = list(row[reserve_start : reserve_start + count])
    nulls = [null] * (plan.num_prefix_blocks - count)
    tail = [*row[plan.num_prefix_blocks : reserve_start], *row[reserve_start + count :]]
    return compressed + nulls + tail


def register_spec() -> None:
    """Tell vLLM which manager serves :class:`HeadPageSpec`; harmless when repeated.

    vLLM's own specs are registered lazily, and only while its registry is empty: asking for them
    first keeps our entry from being taken for theirs.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        HeadPageSpec, HeadPageManager, uniform_type_base_spec=FullAttentionSpec
    )


def as_head_page_specs(specs: dict[str, KVCacheSpec], settings: Settings) -> dict[str, KVCacheSpec]:
    """Every layer's spec as :class:`HeadPageSpec`.

    Args:
        specs: vLLM's spec by layer name; all must be plain full attention.
        settings: resolved settings of this engine.

    Raises:
        TypeError: when a layer is not plain full attention; start-up checks refuse such models
            before, so this is a safeguard against a model those checks do not know.
    """
    for name, spec in specs.items():
        if type(spec) is not FullAttentionSpec or spec.sliding_window is not None:
            raise TypeError(
                f"KV compression needs full attention in every layer, but layer {name} has "
                f"{type(spec).__name__}; run this model without --kv-compression."
            )
    return {
        name: HeadPageSpec.from_full_attention(spec, settings, len(specs))
        for name, spec in specs.items()
    }


register_spec()
