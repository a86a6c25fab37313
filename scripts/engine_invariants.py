"""What must hold in a compressing engine after every step, whatever its clients do.

Read from vLLM's own block pool and scheduler, and from the bytes of its cache. The formulas are
written down once more here on purpose: a mistake in the plugin's own must not hide itself.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashed_blocks import HashedBlockWatch


class BrokenInvariantError(Exception):
    """Something does not add up; the message says what."""


class EngineInvariants:
    """Checks one engine that is stepped in this process.

    Args:
        scheduler: the engine core's.
        watch: of the bytes of cached blocks.
        keep_ratio: of requests that name none.
        protected_tokens: sink and recent tokens together.
        prefill_blocks: the prefill budget, if there is one.

    Attributes:
        seen: how often each situation was checked.
    """

    def __init__(
        self,
        scheduler: Any,
        watch: HashedBlockWatch,
        keep_ratio: float,
        protected_tokens: int,
        prefill_blocks: int | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._cache = scheduler.kv_cache_manager
        (self._manager,) = self._cache.coordinator.single_type_managers
        self._block_size = self._manager.block_size
        self._keep_ratio = keep_ratio
        self._protected = protected_tokens
        self._prefill_blocks = prefill_blocks
        self._watch = watch
        self.seen: Counter[str] = Counter()

    def check(self) -> None:
        """Look at everything; must follow each step.

        Raises:
            BrokenInvariantError: for the first thing that does not add up.
        """
        self._check_pool()
        for request in self._scheduler.running:
            self._check_row(request)
        waiting = {request.request_id for request in self._scheduler.waiting}
        for request_id in waiting & self._manager.req_to_blocks.keys():
            _require(
                not self._manager.req_to_blocks[request_id], f"{request_id} waits, and holds blocks"
            )
        self._watch.after_step()
        _require(not self._watch.written, f"cached blocks {self._watch.written} were written to")

    def check_idle(self) -> None:
        """After the last request: nothing is held, nothing is remembered.

        Raises:
            BrokenInvariantError: if something is.
        """
        self.check()
        pool, manager = self._cache.block_pool, self._manager
        _require(
            pool.get_num_free_blocks() == pool.num_gpu_blocks - 1,
            f"{pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()} blocks were not returned",
        )
        for name in ("_plans", "_reserved", "_runs", "_raw_tokens", "_raw_hits", "_unreported"):
            _require(not getattr(manager, name), f"the block manager's {name} is not empty")
        self.seen.update({f"{kind} comparisons": n for kind, n in self._watch.compared.items()})

    def _check_pool(self) -> None:
        """Free and held blocks are all there are; a block is held as often as it says."""
        pool = self._cache.block_pool
        held = Counter(
            block.block_id
            for row in self._manager.req_to_blocks.values()
            for block in row
            if not block.is_null
        )
        free = pool.get_num_free_blocks()
        _require(
            free + len(held) == pool.num_gpu_blocks - 1,
            f"{free} free and {len(held)} held blocks, but the pool has {pool.num_gpu_blocks - 1}",
        )
        for block_id, count in held.items():
            found = pool.blocks[block_id].ref_cnt
            _require(found == count, f"block {block_id}: {count} owners, reference count {found}")
            if count > 1:
                _require(
                    pool.blocks[block_id].block_hash is not None,
                    f"block {block_id} has {count} owners, and is no cached block",
                )
                self.seen["shared block"] += 1

    def _check_row(self, request: Any) -> None:
        """A request holds exactly what the formula says."""
        rid, size = request.request_id, self._block_size
        row = self._manager.req_to_blocks[rid]
        run, reservation = self._manager._runs.get(rid), self._manager._reserved.get(rid)
        logical = ceil(request.num_computed_tokens / size)
        held = sum(not block.is_null for block in row)
        options = request.sampling_params.extra_args or {}
        if run is None:
            reserve = len(reservation.run.blocks) if reservation else 0
            _require(
                len(row) == held == logical + reserve,
                f"{rid} holds {held} blocks in a row of {len(row)}, not {logical} + {reserve}",
            )
            self.seen["crossing row" if reserve else "raw row"] += 1
            return
        _require(options.get("kvzip") != "off", f"{rid} is off, and compressed")
        ratio = Fraction(str(options.get("kvzip_keep_ratio", self._keep_ratio)))
        prefix = run.plan.num_prefix_blocks
        if rid in self._manager._raw_tokens and self._prefill_blocks is None:  # by itself
            end = options.get("kvzip_context_tokens", request.num_prompt_tokens)
            _require(prefix == end // size, f"{rid}: {prefix} blocks compressed, not {end // size}")
        floor = ceil(min(self._protected, prefix * size) / size)
        kept = max(ceil(ratio * prefix), floor, 1)
        if self._prefill_blocks is not None:
            kept = self._prefill_blocks if run.plan.is_round else min(kept, self._prefill_blocks)
        reserve = len(reservation.run.blocks) if reservation else 0
        _require(
            held == kept + logical - prefix + reserve and len(row) == logical + reserve,
            f"{rid} holds {held} blocks in a row of {len(row)}, not {kept} + {logical} - {prefix}",
        )
        if run.plan.is_round:
            self.seen["round"] += 1
        own = rid in self._manager._raw_tokens
        self.seen["compressed row" if own else "row on a shared prefix"] += 1


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenInvariantError(message)
