"""vLLM's scheduler, which tells the block manager and the workers what only it knows.

``scheduler_config.scheduler_cls`` is vLLM's own way to name a scheduler. vLLM schedules; ten
things are added:

1. The block manager learns which request it works for.
2. The workers learn which requests start from a compressed prefix.
3. A step ends where a prefix is complete, or leaves room for a context that the model repeats.
4. A reset of the prefix cache drops compressed prefixes as well.
5. Prefixes expire while the engine is idle.
6. Requests that could not be compressed start again, uncompressed.
7. Blocks that a preempted request did not compute leave the prefix cache.
8. A client whose request has options of ours is told what became of its prompt.
9. Events about the KV cache tell of raw blocks only.
10. A KV connector sees the raw blocks of rows only.
"""

from __future__ import annotations

import functools
import time
from contextlib import contextmanager, nullcontext
from threading import RLock
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.planning.request_options import has_options
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup, block_bytes
from vllm_kvzip.vllm_bridge.connectors.raw_rows import show_raw_rows
from vllm_kvzip.vllm_bridge.contexts.calls import install_calls
from vllm_kvzip.vllm_bridge.outcomes import NOT_FINITE, told
from vllm_kvzip.vllm_bridge.scheduler.block_manager import HeadPageManager
from vllm_kvzip.vllm_bridge.scheduler.idle_expiry import IdleExpiry
from vllm_kvzip.vllm_bridge.scheduler.other_groups import introduce_groups
from vllm_kvzip.vllm_bridge.scheduler.repeat_schedule import RepeatSchedule
from vllm_kvzip.vllm_bridge.scheduler.room import next_stop, warning_of_large_budget
from vllm_kvzip.vllm_bridge.scheduler.terms import CompressionTerms
from vllm_kvzip.vllm_bridge.scheduler.unconfirmed import withdraw_uncomputed
from vllm_kvzip.vllm_bridge.settings import KEY
from vllm_kvzip.vllm_bridge.step_message import attach
from vllm_kvzip.vllm_bridge.symbols import (
    AsyncScheduler,
    EngineCoreOutput,
    EngineCoreOutputs,
    PauseState,
    RequestStatus,
    Scheduler,
    init_logger,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

    from vllm_kvzip.vllm_bridge.symbols import (
        KVCacheBlock,
        KVCacheManager,
        KVConnectorBase,
        ModelRunnerOutput,
        Request,
        SchedulerConfig,
        SchedulerOutput,
        VllmConfig,
    )

logger = init_logger("vllm." + __name__)


def introduce_requests(cache: KVCacheManager, group: CompressedGroup) -> HeadPageManager:
    """Make ``cache`` tell the compressed group's block manager which request it works for.

    Symptom without it: a manager sees a request's hashes, but not what the request asked for. Two
    methods of this one object are wrapped; they pass everything on unchanged. Remove when vLLM
    hands managers the request.

    Args:
        cache: vLLM's, of all KV cache groups.
        group: the compressed one.

    Returns:
        that manager.

    Raises:
        UnsupportedError: if vLLM hashes parts of blocks: we find prefixes by whole ones.
    """
    coordinator = cache.coordinator
    manager = coordinator.single_type_managers[group.group_id]
    assert isinstance(manager, HeadPageManager)
    hashed = cache.block_pool.hash_block_size
    largest = max(one.block_size for one in coordinator.single_type_managers)
    if cache.block_pool.enable_caching and hashed < largest:
        raise UnsupportedError(
            f"KV compression does not support a prefix cache that hashes {hashed} tokens at once "
            f"beside blocks of {largest} tokens; remove --prefix-match-unit if you set it, else "
            f"add --no-enable-prefix-caching."
        )

    def wrap(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def wrapped(request: Request, *args: Any, **kwargs: Any) -> Any:
            manager.request = request
            return method(request, *args, **kwargs)

        return wrapped

    manager.drops_last_block = group.group_id in coordinator.eagle_group_ids
    cache.get_computed_blocks = wrap(cache.get_computed_blocks)
    cache.allocate_slots = wrap(cache.allocate_slots)
    introduce_groups(coordinator, manager.others, group.group_id, manager.longest_hit)
    tell_of_raw_blocks(cache, manager)
    return manager


def tell_of_raw_blocks(cache: KVCacheManager, manager: HeadPageManager) -> None:
    """Let vLLM's events about its KV cache tell of raw blocks only.

    Subscribers, such as a router, look for hashes of tokens. Compressed prefixes, and what is
    computed over them, are published without an event, under keys that no subscriber can know.

    Symptoms without it: when blocks of a compressed prefix are evicted, an event says that hashes
    were removed which nobody was told of; and when a request that asks for ``kv_cache_report_mode``
    ``full`` starts from a compressed prefix, an event says that the raw blocks of its prompt are
    stored. One method of either object is wrapped; both pass everything else on. Remove when vLLM
    tells events of raw blocks apart from those of others itself.

    Args:
        cache: vLLM's, of all KV cache groups.
        manager: of the compressed group.
    """
    pool, coordinator = cache.block_pool, cache.coordinator
    if not pool.enable_kv_cache_events:
        return
    removed, reused = pool._emit_block_removed_events, coordinator.emit_cached_block_events

    @functools.wraps(removed)
    def emit_removed(block_hashes: Sequence[Any]) -> None:
        removed([key for key in block_hashes if not manager.prefixes.made(key)])

    @functools.wraps(reused)
    def emit_reused(request: Request, computed_blocks: tuple[list[KVCacheBlock], ...]) -> None:
        if manager.prefixes.owner(computed_blocks[manager.kv_cache_group_id]) is None:
            reused(request, computed_blocks)

    pool._emit_block_removed_events = emit_removed
    coordinator.emit_cached_block_events = emit_reused


class _HeadPageScheduling:
    """What is added to each of vLLM's two schedulers."""

    kv_cache_manager: KVCacheManager
    connector: KVConnectorBase | None
    requests: dict[str, Request]
    running: list[Request]
    prev_step_scheduled_req_ids: set[str]
    scheduler_config: SchedulerConfig
    vllm_config: VllmConfig
    num_spec_tokens: int
    need_mamba_block_aligned_split: bool
    _pause_state: PauseState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        groups = self.kv_cache_manager.kv_cache_config
        group = CompressedGroup.find(groups, CompressionTerms)
        self._kvzip_manager = introduce_requests(self.kv_cache_manager, group)
        if self.connector is not None:
            show_raw_rows(self.connector, self._kvzip_manager)
        num_ranks = self.vllm_config.parallel_config.tensor_parallel_size
        # vLLM shows the layers of one pipeline stage; the spec counts those of all of them.
        of_stages = self._kvzip_manager.kv_cache_spec.block_bytes
        self._kvzip_manager.share_pool(
            group.share_of_pool(groups, self.vllm_config),
            max(block_bytes(groups) * num_ranks, of_stages),
        )
        ttl = self._kvzip_manager.kv_cache_spec.reuse.ttl_seconds
        self._kvzip_lock: AbstractContextManager[object] = nullcontext() if ttl is None else RLock()
        self._kvzip_expiry = None
        if ttl is not None:
            self._kvzip_expiry = IdleExpiry(self._kvzip_manager.prefixes, ttl, self._kvzip_lock)
        install_calls()
        self._kvzip_repeats = None
        if (repeat := self._kvzip_manager.kv_cache_spec.repeat) is not None:
            tokens = self.scheduler_config.max_num_batched_tokens
            self._kvzip_repeats = RepeatSchedule(repeat, tokens, 1 + self.num_spec_tokens)
        self._kvzip_manager.by_priority = self.scheduler_config.policy == "priority"
        rule, longest = self._kvzip_manager.rule, self.vllm_config.model_config.max_model_len
        if warning := warning_of_large_budget(rule, longest):
            logger.warning(warning)
        self._kvzip_has_states = self.need_mamba_block_aligned_split
        self._kvzip_splits = rule.has_rounds or self._kvzip_repeats is not None
        if self._kvzip_splits:
            self.need_mamba_block_aligned_split = True

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's schedule, with our message attached."""
        repeats = self._kvzip_repeats
        with self._kvzip_lock:
            if repeats is not None:
                repeats.step_starts(is_paused=self._pause_state == PauseState.PAUSED_ALL)
            output: SchedulerOutput = super().schedule(*args, **kwargs)  # type: ignore[misc]
            scheduled = output.num_scheduled_tokens
            orders = repeats.step_ends(scheduled) if repeats is not None else None
            attach(output, self._kvzip_manager.end_of_schedule(scheduled, orders))
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """vLLM's, without the tokens of requests that could not be compressed.

        The lock keeps prefixes from expiring during the call.
        """
        with self._kvzip_lock:
            return self._update_from_output(scheduler_output, model_runner_output)

    def _update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        manager, ended = self._kvzip_manager, []
        affected = manager.settle(told(model_runner_output))
        for request, reason in affected.items():
            is_over = self.requests.get(request.request_id) is not request
            if is_over:
                continue
            self._start_uncompressed(request, reason)
            longest = request.num_prompt_tokens + request.max_tokens
            if not manager.rule.fits_uncompressed(longest):
                ended.append(request.request_id)
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        failed = self.finish_requests(ended, RequestStatus.FINISHED_ERROR) if ended else []
        for request in failed:
            logger.error(
                "Request %s could not be compressed, and does not fit into the KV cache as it is.",
                request.request_id,
            )
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs())
            of_client.outputs.append(
                EngineCoreOutput(
                    request.request_id,
                    new_token_ids=[],
                    finish_reason=request.get_finished_reason(),
                    events=request.take_events(),
                    trace_headers=request.trace_headers,
                )
            )
        return outputs

    def _start_uncompressed(self, request: Request, reason: str) -> None:
        """Take back what a request computed over a prefix that could not be compressed.

        As vLLM does it when the prefix cache is reset under running requests: the request is
        preempted, and what is being computed for it is dropped. Tokens that it has been sent stay.
        """
        if reason == NOT_FINITE:  # a worker has logged any other failure
            logger.error(
                "Request %s could not be compressed and goes on uncompressed: its keys, values or "
                "scores are NaN or infinite.",
                request.request_id,
            )
        self._kvzip_manager.unconfirmed.leave_alone(request, reason)
        if request.status == RequestStatus.RUNNING:
            self.running.remove(request)
            self._preempt_request(request, time.monotonic(), drop_stale_output=True)
            self.prev_step_scheduled_req_ids.discard(request.request_id)
            request.is_prefill_chunk = True  # no draft tokens, until it is scheduled again
        elif request.num_stale_output_tokens:
            request.drop_stale_output = True

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """vLLM's; blocks that the request did not compute leave the prefix cache before."""
        withdraw_uncomputed(self._kvzip_manager, request)
        super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; the lock keeps prefixes from expiring during the call."""
        with self._kvzip_lock:
            return super().finish_requests(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def kvzip_runs(self) -> Iterator[HeadPageManager]:
        """Compressed prefixes for the transfer of contexts; none expires meanwhile."""
        with self._kvzip_lock:
            yield self._kvzip_manager

    def shutdown(self) -> None:
        """vLLM's; our thread and our metrics end with the engine."""
        if self._kvzip_expiry is not None:
            self._kvzip_expiry.stop()
        self._kvzip_manager.close()
        super().shutdown()  # type: ignore[misc]

    def _mamba_block_aligned_split(
        self, request: Request, num_new_tokens: int, local: int = 0, external: int = 0
    ) -> int:
        """How many tokens of a request a step may compute.

        vLLM calls this for models with recurrent layers, whose state exists only where a step ends:
        so a step ends at the boundary of a prefix as well. We make vLLM call it in two more cases:
        with a prefill or decode budget, so that equal prefixes are compressed at equal positions
        and a request holds no more than the budget allows; and where the model repeats contexts.
        """
        first = request.num_computed_tokens + local + external
        row = self._kvzip_manager.rows.get(request.request_id)
        if row is not None and first + num_new_tokens < row.busy_from:
            if not self._kvzip_has_states:
                return num_new_tokens
        plan, must_wait = self._kvzip_manager.plan_ahead(request)
        if self._kvzip_has_states:
            num_new_tokens = super()._mamba_block_aligned_split(  # type: ignore[misc]
                request, num_new_tokens, local, external
            )
            if plan is not None and first < plan.boundary_tokens < first + num_new_tokens:
                num_new_tokens = plan.boundary_tokens - first
            if not self._kvzip_splits:
                return num_new_tokens
        if self._kvzip_repeats is not None:
            return self._kvzip_repeats.next_stop(request, plan, first, num_new_tokens)
        manager = self._kvzip_manager
        return next_stop(manager, request, plan, must_wait, first, num_new_tokens)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        """vLLM's; a client whose request has options of ours is told what became of its prompt.

        ``kv_transfer_params`` is the only field of an answer that a scheduler can fill. A KV
        connector may fill it as well.
        """
        told: dict[str, Any] = {}
        params = request.sampling_params
        if params is not None and has_options(params.extra_args):
            told = {KEY: self._kvzip_manager.outcome(request)}
        connectors, encoder_params = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        return {**(connectors or {}), **told} or None, encoder_params

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM's reset, which drops the compressed prefixes as well."""
        with self._kvzip_lock:
            done: bool = super().reset_prefix_cache(*args, **kwargs)  # type: ignore[misc]
            if done:
                self._kvzip_manager.prefixes.clear()
        return done


class HeadPageScheduler(_HeadPageScheduling, Scheduler):
    """vLLM's scheduler for compressed prefixes."""


class HeadPageAsyncScheduler(_HeadPageScheduling, AsyncScheduler):
    """vLLM's asynchronous scheduler for compressed prefixes."""
