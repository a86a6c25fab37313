"""Scheduler side: compressed prefixes as entries of vLLM's own prefix cache.

A compressed prefix is a run of blocks. Its blocks are published in vLLM's block pool like any
cached block, under keys made of three parts: the hash of the prefix's tokens (LoRA adapter, cache
salt and multimodal inputs are part of it), the keep ratio and quality loss that were asked for, and
a fingerprint of everything else that shaped the compression. So reference counts, LRU eviction, the
reset of the cache and the pool's accounting are vLLM's own.

A request starts from a run only while all blocks of the run are cached. Once compressed, the blocks
of a run are never written to.
"""

from __future__ import annotations

import struct
import time
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import ContextFileError
from vllm_kvzip.vllm_bridge.scheduler.row_state import PrefixRun
from vllm_kvzip.vllm_bridge.symbols import BlockHash, make_block_hash_with_group_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.reuse_rule import ReuseRule
    from vllm_kvzip.vllm_bridge.contexts.source import RunSource
    from vllm_kvzip.vllm_bridge.scheduler.row_state import Terms
    from vllm_kvzip.vllm_bridge.stats_export import SchedulerRecorder
    from vllm_kvzip.vllm_bridge.symbols import (
        BlockHashWithGroupId,
        BlockPool,
        KVCacheBlock,
    )


class CompressedPrefixCache:
    """Which compressed prefixes are cached, and where.

    Args:
        pool: vLLM's block pool.
        group_id: the KV cache group of the compressed layers.
        rule: see :class:`ReuseRule`.
        recorder: metrics.
        clock: seconds.
    """

    def __init__(
        self,
        pool: BlockPool,
        group_id: int,
        rule: ReuseRule,
        recorder: SchedulerRecorder,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool = pool
        self._group_id = group_id
        self._rule = rule
        self._fingerprint = bytes.fromhex(rule.fingerprint)
        self._recorder = recorder
        self._clock = clock
        self._runs: OrderedDict[int, PrefixRun] = OrderedDict()  # by serial, oldest use first
        self._by_key: dict[tuple[bytes, Terms], PrefixRun] = {}
        self._by_block: dict[int, PrefixRun] = {}
        self._boundaries: Counter[int] = Counter()
        self._dropped: list[int] = []

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def keeps_tokens(self) -> bool:
        """Whether cached runs have a source; see :class:`ReuseRule`."""
        return self._rule.keeps_tokens

    def add(self, run: PrefixRun) -> bool:
        """Publish a run, unless a run of the same key is cached already.

        Two runs of one key may keep different tokens where two scores are nearly equal. So blocks
        of both must never be mixed.

        Returns:
            whether the run was published.
        """
        if run.key in self._by_key:
            if self._is_whole(self._by_key[run.key]):
                return False
            self.drop(self._by_key[run.key], "lru")
        num_tokens = run.plan.boundary_tokens
        for key, block in zip(self._keys(run), run.blocks, strict=True):
            self._pool._insert_block_hash(key, block, num_tokens=num_tokens)
            self._by_block[block.block_id] = run
        self._runs[run.serial] = run
        self._by_key[run.key] = run
        self._boundaries[run.plan.num_prefix_blocks] += 1
        self.used(run)
        self._recorder.prefix_cached()
        return True

    def adopt(
        self,
        plan: PrefixPlan,
        prefix_hash: bytes,
        source: RunSource,
        fill: Callable[[int, list[int]], None],
    ) -> None:
        """Cache a compressed prefix that comes from elsewhere; nobody uses it yet.

        Args:
            plan: of its compression.
            prefix_hash: vLLM's hash, in this engine, of the tokens before the boundary.
            source: these tokens.
            fill: lets the workers write its pages; gets the run's serial number and its block ids.

        Raises:
            ContextFileError: if there is no room; or what ``fill`` raises. The pool is as it was
                then, but for cached blocks that had to make room.
        """
        needed, free = plan.num_compressed_blocks, self._pool.get_num_free_blocks()
        if needed > free:
            raise ContextFileError(
                f"There is no room for the context: it needs {needed} blocks, and requests leave "
                f"{free} of the pool."
            )
        blocks = self._pool.get_new_blocks(needed)
        self.blocks_taken(blocks)
        run = PrefixRun(plan, blocks, prefix_hash, source=source)
        try:
            fill(run.serial, [block.block_id for block in blocks])
            self.add(run)
        finally:
            self._pool.free_blocks(reversed(blocks))

    def find(
        self,
        block_hashes: Sequence[Any],
        max_blocks: int,
        terms: Terms,
        accepts: Callable[[PrefixPlan], bool],
    ) -> PrefixRun | None:
        """The longest cached prefix of a request.

        Args:
            block_hashes: vLLM's hashes of the request's blocks.
            max_blocks: most blocks of the prefix before compression.
            terms: on which the prefix was compressed.
            accepts: whether the request may start from a prefix with that plan.
        """
        self.expire()
        limit = min(max_blocks, len(block_hashes))
        lengths: Iterable[int] = range(limit, 0, -1)
        if len(self._boundaries) < limit:
            lengths = sorted((n for n in self._boundaries if n <= limit), reverse=True)
        for num_blocks in lengths:
            run = self._by_key.get((block_hashes[num_blocks - 1], terms))
            if run is None or not accepts(run.plan):
                continue
            if self._is_whole(run):
                return run
            self.drop(run, "reset")
        return None

    def whole_runs(self) -> list[PrefixRun]:
        """All cached runs, least recently used first."""
        self.expire()
        return [run for run in self._runs.values() if self._is_whole(run)]

    def has(self, prefix_hash: bytes, plan: PrefixPlan) -> bool:
        """Whether a run of that hash, and on the terms of that plan, is cached."""
        return any(run.key == (prefix_hash, plan.terms) for run in self.whole_runs())

    def owner(self, blocks: Sequence[KVCacheBlock]) -> PrefixRun | None:
        """The cached run that begins with the first of ``blocks``; None when no run does.

        Args:
            blocks: what vLLM found for a request; can be empty.
        """
        return self._by_block.get(blocks[0].block_id) if blocks else None

    def cached_tail(
        self, run: PrefixRun, block_hashes: Sequence[Any], max_blocks: int
    ) -> list[KVCacheBlock]:
        """Blocks of the dense tail that were computed over the run and are cached.

        Args:
            run: what the row would begin with.
            block_hashes: vLLM's hashes of the request's blocks.
            max_blocks: the tail ends before the block of this index.

        Returns:
            blocks from the boundary on, up to the first one that is not cached.
        """
        tail: list[KVCacheBlock] = []
        for index in range(run.plan.num_prefix_blocks, min(max_blocks, len(block_hashes))):
            block = self.cached_block(run, block_hashes[index], index, self._group_id)
            if block is None:
                break
            tail.append(block)
        return tail

    def cached_block(
        self, run: PrefixRun, block_hash: bytes, index: int, group_id: int
    ) -> KVCacheBlock | None:
        """A cached block for a row that begins with the run; None when it is not cached.

        Args:
            run: what the row begins with in the compressed group.
            block_hash: vLLM's hash of the block's tokens and all before them.
            index: of the block in the row. Before the boundary it is a raw block.
            group_id: its KV cache group.
        """
        if index < run.plan.num_prefix_blocks:
            key = make_block_hash_with_group_id(BlockHash(block_hash), group_id)
        else:
            key = self._tail_key(run, block_hash, group_id)
        return self._pool.cached_block_hash_to_block.get_one_block(key)

    def cache_tail(
        self,
        run: PrefixRun,
        block_hashes: Sequence[bytes],
        row_blocks: Sequence[KVCacheBlock],
        first: int,
        num_tokens: int,
    ) -> int:
        """Publish full dense blocks that were computed over the run, if the run itself is cached.

        Args:
            run: what the row begins with.
            block_hashes: vLLM's hashes of the request's full blocks.
            row_blocks: of the request.
            first: blocks of the row before this index have been published.
            num_tokens: tokens that are computed.

        Returns:
            index of the first block of the row that is still to be published.
        """
        block_size = run.plan.boundary_tokens // run.plan.num_prefix_blocks
        end = min(num_tokens // block_size, len(block_hashes))
        self.publish_tail(run, block_hashes, first, row_blocks[first:end], self._group_id)
        return max(first, end)

    def publish_tail(
        self,
        run: PrefixRun,
        block_hashes: Sequence[bytes],
        first: int,
        blocks: Sequence[KVCacheBlock | None],
        group_id: int,
    ) -> None:
        """Publish blocks behind the boundary under keys of the run, if the run itself is cached.

        Args:
            run: what the row begins with in the compressed group.
            block_hashes: vLLM's hashes of the request's full blocks.
            first: index of the first of ``blocks`` in the row.
            blocks: one after the other; None and null blocks are left out.
            group_id: their KV cache group.
        """
        if run.serial not in self._runs:
            return
        block_size = run.plan.boundary_tokens // run.plan.num_prefix_blocks
        for index, block in enumerate(blocks, start=first):
            if block is None or block.is_null:
                continue
            key = self._tail_key(run, block_hashes[index], group_id)
            self._pool._insert_block_hash(key, block, num_tokens=(index + 1) * block_size)

    def used(self, run: PrefixRun) -> None:
        """Note that a row begins with the run, or has just stopped to."""
        if run.serial in self._runs:
            run.last_used = self._clock()
            self._runs.move_to_end(run.serial)

    def blocks_taken(self, blocks: Iterable[KVCacheBlock]) -> None:
        """Drop the runs that lost a block, because the pool gave these blocks to a request."""
        if self._by_block:
            for block in blocks:
                if run := self._by_block.get(block.block_id):
                    self.drop(run, "lru")

    def clear(self) -> None:
        """Drop all runs, because vLLM's prefix cache was reset."""
        for run in list(self._runs.values()):
            self.drop(run, "reset")

    def drop(self, run: PrefixRun, reason: str) -> None:
        """Take a run out of the cache; rows that begin with it keep its blocks.

        Args:
            run: a cached run.
            reason: one of ``metrics.EVICTION_REASONS``.
        """
        del self._runs[run.serial]
        del self._by_key[run.key]
        self._boundaries[run.plan.num_prefix_blocks] -= 1
        if not self._boundaries[run.plan.num_prefix_blocks]:
            del self._boundaries[run.plan.num_prefix_blocks]
        for key, block in zip(self._keys(run), run.blocks, strict=True):
            del self._by_block[block.block_id]
            if block.block_hash == key:
                self._pool.evict_blocks({block.block_id})
        self._dropped.append(run.serial)
        self._recorder.prefix_evicted(reason)

    def expire(self) -> float | None:
        """Drop the runs that no request has used for the time to live.

        Returns:
            seconds until the next run can expire; None when no run can.
        """
        ttl = self._rule.ttl_seconds
        if ttl is None:
            return None
        now = self._clock()
        while self._runs:
            run = next(iter(self._runs.values()))
            if (left := run.last_used + ttl - now) > 0:
                return left
            if run.users:
                self.used(run)
            else:
                self.drop(run, "ttl")
        return None

    def shrink(self, run: PrefixRun, plan: PrefixPlan) -> list[KVCacheBlock]:
        """Leave a run the first of its blocks only; rows that begin with it must give up the rest.

        Args:
            run: cached or not.
            plan: with fewer compressed blocks.

        Returns:
            the others, which are not published any more.
        """
        count = plan.num_compressed_blocks
        unused = run.blocks[count:]
        if run.serial in self._runs:
            for key, block in zip(self._keys(run)[count:], unused, strict=True):
                del self._by_block[block.block_id]
                if block.block_hash == key:
                    self._pool.evict_blocks({block.block_id})
        run.plan, run.blocks = plan, run.blocks[:count]
        return unused

    def failed(self, run: PrefixRun) -> None:
        """Drop a run whose compression failed, if it is cached."""
        if run.serial in self._runs:
            self.drop(run, "failed")

    def take_dropped(self) -> list[int]:
        """Serials of the runs dropped since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _is_whole(self, run: PrefixRun) -> bool:
        """Whether all blocks of the run are still published under its keys."""
        published = zip(self._keys(run), run.blocks, strict=True)
        return all(block.block_hash == key for key, block in published)

    def made(self, key: bytes) -> bool:
        """Whether a key of vLLM's block pool is one of ours, not the hash of a raw block."""
        return bool(self._fingerprint) and self._fingerprint in key

    def _keys(self, run: PrefixRun) -> list[BlockHashWithGroupId]:
        prefix_hash, (keep_ratio, quality_loss) = run.key
        asked = struct.pack(">dd", keep_ratio, quality_loss or 0.0)
        stem = prefix_hash + asked + self._fingerprint
        return [
            make_block_hash_with_group_id(
                BlockHash(stem + index.to_bytes(4, "big")), self._group_id
            )
            for index in range(len(run.blocks))
        ]

    def _tail_key(self, run: PrefixRun, block_hash: bytes, group_id: int) -> BlockHashWithGroupId:
        stem = block_hash + self._fingerprint + b"tail" + run.serial.to_bytes(8, "big")
        return make_block_hash_with_group_id(BlockHash(stem), group_id)
