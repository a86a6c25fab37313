"""What a KV connector is shown of block table rows: their raw blocks, and nothing else.

A connector keeps blocks outside vLLM's cache, under hashes of their tokens, and takes the block of
index ``i`` in a row for that of hash ``i``. A compressed prefix is something else, and so is all
that is computed over one. So a row is shown as follows::

    prefill      [prompt blocks ...]                        all of it
    crossing     [prompt blocks ...][n' reserved blocks]    whole blocks that were computed raw
    folded       [n' compressed][null ...][dense tail ...]  nothing: the request is not mentioned

In the step in which a row folds, its request is shown as preempted and resumed without a block. So
a connector waits for stores that still read the prompt's blocks, which have just been given back,
and forgets them. Blocks that the connector is not shown are given away and written to as well:
every block that a step takes from the pool is shown as the target of a copy, which is vLLM's own
way to say that a block is about to be overwritten.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from vllm_kvzip.vllm_bridge.compressed_group import NULL_BLOCK
from vllm_kvzip.vllm_bridge.symbols import KVCacheBlockCopy

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_kvzip.vllm_bridge.symbols import (
        BlockPool,
        CachedRequestData,
        KVCacheBlock,
        KVCacheBlocks,
        KVConnectorBase,
        Request,
        SchedulerOutput,
    )


class Row(Protocol):
    """How far a request's row has come; ``RowState`` of the scheduler."""

    @property
    def run(self) -> object | None:
        """The compressed prefix that the row begins with."""
        ...

    @property
    def num_raw_tokens(self) -> int | None:
        """Tokens computed while it began with raw blocks; None before its first crossing."""
        ...

    @property
    def num_loading_tokens(self) -> int:
        """Tokens until whose end a load fills it; 0 when none does."""
        ...


class Rows(Protocol):
    """The block manager of the compressed group."""

    block_pool: BlockPool
    block_size: int
    rows: Mapping[str, Row]
    req_to_blocks: Mapping[str, Sequence[KVCacheBlock]]

    def hit_of(self, request: Request) -> object | None:
        """The compressed prefix that the last lookup found for a request."""
        ...


def show_raw_rows(connector: KVConnectorBase, manager: Rows) -> None:
    """Let a connector see the raw blocks of rows only; some methods of this object are wrapped.

    Symptom without it: compressed blocks are stored under hashes of the prompt's tokens, and later
    requests with these tokens load them. Remove when vLLM tells connectors which blocks of a row
    are what their hashes say.

    Args:
        connector: the scheduler's part of it.
        manager: of the compressed group, the only one.
    """
    rows = _RawRows(manager)
    matched, allocated = connector.get_num_new_matched_tokens, connector.update_state_after_alloc
    build, finished = connector.build_connector_meta, connector.request_finished

    @functools.wraps(matched)
    def get_num_new_matched_tokens(
        request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if manager.hit_of(request) is not None:
            return 0, False
        found, is_later = matched(request, num_computed_tokens)
        return found if found is None else max(0, found), is_later

    @functools.wraps(allocated)
    def update_state_after_alloc(
        request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        shown = type(blocks)((blocks.blocks[0][: rows.num_raw_blocks(request.request_id)],))
        allocated(request, shown, num_external_tokens)

    @functools.wraps(build)
    def build_connector_meta(scheduler_output: SchedulerOutput) -> Any:
        return build(rows.shown(scheduler_output))

    @functools.wraps(finished)
    def request_finished(request: Request, block_ids: Sequence[int]) -> Any:
        return finished(request, list(block_ids[: rows.num_raw_blocks(request.request_id)]))

    taken = manager.block_pool.get_new_blocks

    @functools.wraps(taken)
    def get_new_blocks(*args: Any, **kwargs: Any) -> list[KVCacheBlock]:
        blocks: list[KVCacheBlock] = taken(*args, **kwargs)
        rows.taken.update(block.block_id for block in blocks)
        return blocks

    connector.get_num_new_matched_tokens = get_num_new_matched_tokens
    connector.update_state_after_alloc = update_state_after_alloc
    connector.build_connector_meta = build_connector_meta
    connector.request_finished = request_finished
    manager.block_pool.get_new_blocks = get_new_blocks
    if hasattr(connector, "request_finished_all_groups"):
        all_finished = connector.request_finished_all_groups

        @functools.wraps(all_finished)
        def request_finished_all_groups(request: Request, block_ids: tuple[list[int], ...]) -> Any:
            num_raw = rows.num_raw_blocks(request.request_id)
            return all_finished(request, tuple(of_group[:num_raw] for of_group in block_ids))

        connector.request_finished_all_groups = request_finished_all_groups


class _RawRows:
    """Turns vLLM's message to a connector into what it may know.

    Args:
        manager: of the compressed group.

    Attributes:
        taken: blocks that were taken from the pool since the last message.
    """

    def __init__(self, manager: Rows) -> None:
        self._manager = manager
        self._shown: dict[str, int] = {}  # how many blocks of a request the connector knows
        self._crossing: dict[str, Row] = {}
        self.taken: set[int] = set()

    def num_raw_blocks(self, request_id: str) -> int | None:
        """How many blocks at the row's beginning a connector may know; None: all of them."""
        row = self._manager.rows.get(request_id)
        if row is None or (row.run is None and row.num_raw_tokens is None):
            return None
        if row.run is not None or row.num_raw_tokens is None:
            return 0
        return row.num_raw_tokens // self._manager.block_size

    def shown(self, output: SchedulerOutput) -> SchedulerOutput:
        """What the connector is told of a step.

        Args:
            output: what vLLM would tell it; stays as it is.
        """
        folded = self._folded()
        for request_id in output.finished_req_ids:
            self._shown.pop(request_id, None)
        new = [
            replace(request, block_ids=(self._take_all(request.req_id),))
            for request in output.scheduled_new_reqs
            if not self._is_compressed(request.req_id)
        ]
        cached = self._cached(output.scheduled_cached_reqs, folded)
        scheduled = {
            request_id: num_tokens
            for request_id, num_tokens in output.num_scheduled_tokens.items()
            if not self._is_compressed(request_id)
        }
        copies = [
            *(output.kv_cache_block_copies or ()),
            *(KVCacheBlockCopy(NULL_BLOCK, block) for block in sorted(self.taken)),
        ]
        self.taken.clear()
        return replace(
            output,
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=scheduled,
            total_num_scheduled_tokens=sum(scheduled.values()),
            preempted_req_ids=self._preempted(output) | folded,
            kv_cache_block_copies=copies or None,
            kv_connector_block_state=None,
        )

    def _preempted(self, output: SchedulerOutput) -> set[str]:
        """Requests that have been preempted, without those that wait for a load already.

        Symptom without it: a request that is preempted between two steps, because it could not be
        compressed, can start a load in the next one. vLLM's connector expects of a preempted
        request that only stores are under way, and ends the engine. A connector begins no load
        while stores are, so there is nothing to wait for. Remove when vLLM allows it.
        """
        rows = self._manager.rows
        return {
            request_id
            for request_id in output.preempted_req_ids or ()
            if request_id not in rows or not rows[request_id].num_loading_tokens
        }

    def _folded(self) -> set[str]:
        """Requests whose rows have folded since the last message, and which are not over."""
        folded = set()
        for request_id, row in list(self._crossing.items()):
            is_same = self._manager.rows.get(request_id) is row
            if not is_same or row.run is not None:
                del self._crossing[request_id]
            if is_same and row.run is not None and request_id in self._shown:
                folded.add(request_id)
        return folded

    def _cached(self, cached: CachedRequestData, folded: set[str]) -> CachedRequestData:
        """Of requests that run or resume: new raw blocks, or that all are gone."""
        shown = type(cached).make_empty()
        gone = set(folded)
        for index, request_id in enumerate(cached.req_ids):
            if self._is_compressed(request_id):
                if request_id in self._shown:  # resumed on a compressed prefix
                    gone.add(request_id)
                continue
            known = self._shown.get(request_id, 0)
            if request_id in cached.resumed_req_ids:
                known = 0
                shown.resumed_req_ids.add(request_id)
            blocks = self._take_all(request_id)[known:]
            of_step = (blocks,) if cached.new_block_ids[index] is not None else None
            self._append(shown, request_id, of_step, cached.num_computed_tokens[index])
            shown.num_output_tokens.append(cached.num_output_tokens[index])
            if request_id in cached.all_token_ids:
                shown.all_token_ids[request_id] = cached.all_token_ids[request_id]
        for request_id in sorted(gone):
            del self._shown[request_id]
            shown.resumed_req_ids.add(request_id)
            self._append(shown, request_id, ([],), 0)
            shown.num_output_tokens.append(0)
        return shown

    @staticmethod
    def _append(
        shown: CachedRequestData,
        request_id: str,
        block_ids: tuple[list[int]] | None,
        num_computed_tokens: int,
    ) -> None:
        shown.req_ids.append(request_id)
        shown.new_block_ids.append(block_ids)
        shown.num_computed_tokens.append(num_computed_tokens)

    def _is_compressed(self, request_id: str) -> bool:
        row = self._manager.rows.get(request_id)
        return row is not None and row.run is not None

    def _take_all(self, request_id: str) -> list[int]:
        """Ids of a row's raw blocks; the connector knows them from now on."""
        num_raw = self.num_raw_blocks(request_id)
        blocks = self._manager.req_to_blocks[request_id][:num_raw]
        self._shown[request_id] = len(blocks)
        if num_raw is not None:
            self._crossing[request_id] = self._manager.rows[request_id]
        return [block.block_id for block in blocks]
