"""Scheduler side: KV cache groups that are not compressed, beside the one that is.

A model that mixes full attention with sliding windows has a KV cache group for each kind. Only the
group of full attention is compressed; the others hold what vLLM lets them hold. So:

* A compressed prefix can only be used where the other groups have what a request needs after it,
  such as the blocks of the last window. So they keep these blocks at each boundary.
* What the other layers compute over a compressed prefix differs from what they compute over the raw
  one. So it is published under keys of the run, and never under the raw hash.
* Where the model repeats a context before it is compressed, sliding windows see the end of the
  context then. So it is kept until that has been done.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_kvzip.vllm_bridge.symbols import MambaManager

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import CompressedPrefixCache
    from vllm_kvzip.vllm_bridge.scheduler.row_state import PrefixRun, RowState
    from vllm_kvzip.vllm_bridge.symbols import (
        KVCacheBlock,
        Request,
        SingleTypeKVCacheManager,
    )


class OtherGroups:
    """vLLM's block managers of the groups that are not compressed.

    Args:
        prefixes: cached compressed prefixes.
        rows: state of each request's row in the compressed group, by request id.
        keeps_ends: whether the model repeats contexts.
    """

    def __init__(
        self,
        prefixes: CompressedPrefixCache,
        rows: Mapping[str, RowState],
        keeps_ends: bool = False,
    ) -> None:
        self._prefixes = prefixes
        self._rows = rows
        self._keeps_ends = keeps_ends
        self._managers: dict[int, SingleTypeKVCacheManager] = {}

    def add(self, manager: SingleTypeKVCacheManager) -> None:
        """Watch over what a block manager publishes.

        Symptom without it: blocks that were computed over a compressed prefix would be published
        under the hash of the raw tokens, and any request with these tokens would find them. Remove
        when vLLM asks one place for the keys of all groups.

        Args:
            manager: its method ``cache_blocks`` is wrapped.
        """
        self._managers[manager.kv_cache_group_id] = manager
        vllms = manager.cache_blocks

        @functools.wraps(vllms)
        def _watched(
            request: Request,
            num_tokens: int,
            *args: Any,
            replay_boundaries: Sequence[int],
            **kwargs: Any,
        ) -> None:
            row = self._rows[request.request_id]
            if row.num_raw_tokens is None and row.run is not None:
                num_tokens = row.most_tail_tokens(num_tokens)
                boundaries = [*replay_boundaries, request.shared_prefix_boundary]
                self._cache_tail(manager, row.run, request, num_tokens, boundaries, *args, **kwargs)
                return
            if row.num_raw_tokens is not None:
                num_tokens = min(num_tokens, request.num_prompt_tokens, row.num_raw_tokens)
            boundaries = list(replay_boundaries)
            if row.plan is not None and not row.plan.is_round:
                boundaries.append(row.plan.boundary_tokens)
            vllms(request, num_tokens, *args, replay_boundaries=boundaries, **kwargs)

        manager.cache_blocks = _watched
        if self._keeps_ends:
            self._keep_ends(manager)

    def _keep_ends(self, manager: SingleTypeKVCacheManager) -> None:
        """Let a block manager free no block that a token at the boundary of a prefix sees.

        Symptom without it: a prompt ends after its boundary, and a step that begins between the two
        gives a block to another request of which the model needs a token when it repeats the
        prefix. The reserve is there in the step after the one that completes the prefix, and what
        is freed then is read before anybody writes to it. One method of this one object is wrapped.
        Remove when vLLM asks how long a block is needed.
        """
        vllms = manager.remove_skipped_blocks

        @functools.wraps(vllms)
        def _kept(request_id: str, num_processed_tokens: int, *args: Any, **kwargs: Any) -> None:
            row = self._rows.get(request_id)
            if row is not None and row.plan is not None and row.reservation is None:
                num_processed_tokens = min(num_processed_tokens, row.plan.boundary_tokens)
            vllms(request_id, num_processed_tokens, *args, **kwargs)

        manager.remove_skipped_blocks = _kept

    def all_managers(self) -> Sequence[SingleTypeKVCacheManager]:
        """Those that were added."""
        return tuple(self._managers.values())

    def serve(
        self, run: PrefixRun, block_hashes: Sequence[Any], num_blocks: int
    ) -> tuple[int, dict[int, list[KVCacheBlock]]] | None:
        """What the other groups have cached for a row that begins with a run.

        Args:
            run: what the row begins with in the compressed group.
            block_hashes: vLLM's hashes of the request's blocks.
            num_blocks: where the compressed group's cached blocks end.

        Returns:
            where the blocks of all groups end, the boundary or a later block up to ``num_blocks``,
            and the blocks by group, with null blocks for what a group does not need; None when a
            group has not even what is needed at the boundary.
        """
        for end in range(num_blocks, run.plan.num_prefix_blocks - 1, -1):
            found: dict[int, list[KVCacheBlock]] = {}
            for group_id, manager in self._managers.items():
                blocks = self._blocks_before(manager, run, block_hashes, end)
                if blocks is None:
                    break
                found[group_id] = blocks
            else:
                return end, found
        return None

    def _blocks_before(
        self,
        manager: SingleTypeKVCacheManager,
        run: PrefixRun,
        block_hashes: Sequence[Any],
        end: int,
    ) -> list[KVCacheBlock] | None:
        """A group's blocks that the token after block ``end`` needs, or None if one is missing."""
        size = manager.block_size
        first = manager.get_num_skipped_tokens(end * size) // size
        blocks: list[KVCacheBlock] = [manager.block_pool.null_block] * end
        for index in range(end - 1, first - 1, -1):
            block = self._prefixes.cached_block(
                run, block_hashes[index], index, manager.kv_cache_group_id
            )
            if block is None:
                return None
            blocks[index] = block
        return blocks

    def _cache_tail(
        self,
        manager: SingleTypeKVCacheManager,
        run: PrefixRun,
        request: Request,
        num_tokens: int,
        boundaries: Sequence[int],
        retention_interval: int | None = None,
    ) -> None:
        """Publish a group's blocks that were computed over a run, under keys of the run.

        vLLM's own rule says which of them are worth it.
        """
        start = manager.num_cached_block.get(request.request_id, 0)
        end = min(num_tokens // manager.block_size, len(request.block_hashes))
        if end <= start:
            return
        mask = manager.reachable_block_mask(
            start_block=start,
            end_block=end,
            alignment_tokens=manager.cache_hit_alignment_tokens,
            kv_cache_spec=manager.kv_cache_spec,
            use_eagle=manager.use_eagle,
            retention_interval=retention_interval,
            reachable_boundaries=boundaries,
        )
        row_blocks = manager.req_to_blocks[request.request_id]
        blocks = [
            None if mask is not None and not mask[index - start] else row_blocks[index]
            for index in range(start, end)
        ]
        self._prefixes.publish_tail(
            run, request.block_hashes, start, blocks, manager.kv_cache_group_id
        )
        if isinstance(manager, MambaManager):  # nobody may copy these states in this step
            manager.cached_blocks_this_step.update(
                block.block_hash for block in blocks if block is not None and block.block_hash
            )
        manager.num_cached_block[request.request_id] = end


def introduce_groups(
    coordinator: Any, others: OtherGroups, own_group: int, longest_hit: Callable[..., Any]
) -> None:
    """Let the compressed group's manager answer the lookup of all groups.

    Symptom without it: with several groups vLLM asks a manager's class, which knows no request, and
    a compressed prefix is found by its request's options. One method of this one object is wrapped.
    Remove when vLLM asks the managers themselves.

    Args:
        coordinator: vLLM's, of all groups.
        others: gets the managers of the other groups.
        own_group: index of the compressed group.
        longest_hit: takes vLLM's method and its arguments.
    """
    for group_id, manager in enumerate(coordinator.single_type_managers):
        if group_id != own_group:
            others.add(manager)
    coordinator.find_longest_cache_hit = functools.partial(
        longest_hit, coordinator.find_longest_cache_hit
    )
