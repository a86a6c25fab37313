"""What must hold in a compressing engine after every step, whatever its clients do.

Read from vLLM's own block pool and scheduler, from the bytes of its cache, and from the pages that
the worker says it uses. What a request must hold is computed anew, see :mod:`held_blocks`.
"""

from __future__ import annotations

from collections import Counter
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soaking.hashed_blocks import HashedBlockWatch
    from soaking.held_blocks import HeldBlocks


class BrokenInvariantError(Exception):
    """Something does not add up; the message says what."""


class EngineInvariants:
    """Checks one engine that is stepped in this process.

    Args:
        scheduler: the engine core's.
        watch: of the bytes of cached blocks.
        formula: what requests must hold.
        worker: the plugin's part of it, or None where there is no worker.

    Attributes:
        seen: how often each situation was checked.
    """

    def __init__(
        self, scheduler: Any, watch: HashedBlockWatch, formula: HeldBlocks, worker: Any = None
    ) -> None:
        self._scheduler = scheduler
        self._cache = scheduler.kv_cache_manager
        self._managers = self._cache.coordinator.single_type_managers
        (self._manager,) = (one for one in self._managers if hasattr(one, "rows"))
        self._formula = formula
        self._worker = worker
        self._complete: dict[tuple[str, int], int] = {}
        self._known_pages: dict[str, Any] = {}
        self._watch = watch
        self._last_step = 0
        self.seen: Counter[str] = Counter()

    def check(self) -> None:
        """Look at everything; must follow each step, and may come in between.

        Raises:
            BrokenInvariantError: for the first thing that does not add up.
        """
        self._check_pool()
        for request in self._scheduler.running:
            self._check_row(request)
        self._check_nobody_is_forgotten()
        waiting = {request.request_id for request in self._scheduler.waiting}
        for manager in self._managers:
            for request_id in waiting & manager.req_to_blocks.keys():
                held = manager.req_to_blocks[request_id]
                _require(not held, f"{request_id} waits, and holds blocks")
        step, self._last_step = self._last_step, self._scheduler.current_step
        self._watch.after_step(stepped=step != self._last_step)
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
        _require(not manager.rows, "the block manager's rows is not empty")
        if self._worker is not None:
            left = {
                "compressed prefixes": self._worker.prefixes.states,
                "complete prompts": self._worker._complete,
                "kept queries": self._worker._observation,
            }
            for name, found in left.items():
                _require(not found, f"the worker still has {name}")
        self.seen.update({f"{kind} comparisons": n for kind, n in self._watch.compared.items()})

    def _check_pool(self) -> None:
        """Free and held blocks are all there are; a block is held as often as it says."""
        pool = self._cache.block_pool
        held = Counter(
            block.block_id
            for manager in self._managers
            for row in manager.req_to_blocks.values()
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
        rid, size, formula = request.request_id, self._formula.block_size, self._formula
        row, state = self._manager.req_to_blocks[rid], self._manager.rows[rid]
        run, reservation = state.run, state.reservation
        logical = ceil(request.num_computed_tokens / size)
        held = sum(not block.is_null for block in row)
        options = request.sampling_params.extra_args or {}
        if run is None:
            reserve = len(reservation.run.blocks) if reservation else 0
            _require(
                len(row) == held == logical + reserve,
                f"{rid} holds {held} blocks in a row of {len(row)}, not {logical} + {reserve}",
            )
            known = self._worker is not None and rid in self._worker.prefixes.states
            _require(not known, f"{rid} is not compressed, and its worker reads a prefix")
            self.seen["crossing row" if reserve else "raw row"] += 1
            return
        _require(options.get("kvzip") != "off", f"{rid} is off, and compressed")
        prefix = run.plan.num_prefix_blocks
        if state.num_raw_tokens is not None and formula.prefill_blocks is None:  # by itself
            end = options.get("kvzip_context_tokens", request.num_prompt_tokens)
            _require(prefix == end // size, f"{rid}: {prefix} blocks compressed, not {end // size}")
        kept = formula.kept(prefix, options.get("kvzip_keep_ratio", formula.keep_ratio))
        if run.plan.is_round:
            kept = formula.prefill_blocks or kept
        reserve = len(reservation.run.blocks) if reservation else 0
        _require(
            held == kept + logical - prefix + reserve and len(row) == logical + reserve,
            f"{rid} holds {held} blocks in a row of {len(row)}, not {kept} + {logical} - {prefix}",
        )
        if run.plan.is_round:
            self.seen["round"] += 1
        self._check_pages(request, run)
        own = state.num_raw_tokens is not None
        self.seen["compressed row" if own else "row on a shared prefix"] += 1

    def _check_pages(self, request: Any, run: Any) -> None:
        """The worker reads the pages of just those blocks, each for one head."""
        request_id = request.request_id
        known = (run, request.num_preemptions)
        if self._worker is None or self._known_pages.get(request_id) == known:
            return
        state = self._worker.prefixes.states.get(request_id)
        _require(state is not None, f"{request_id} is compressed, and its worker knows nothing")
        pool, tiers = self._worker.cache.pool, state.prefix.tiers
        full = run.plan.num_full_blocks
        layer_stride, block_stride = pool.strides

        def pages_of(blocks: Any) -> list[int]:
            return sorted(
                pool.first_page + layer * layer_stride + block.block_id * block_stride + head
                for block in blocks
                for layer in range(pool.num_layers)
                for head in range(pool.num_kv_heads)
            )

        used = sorted(tiers[0].page_ids.tolist())
        _require(used == pages_of(run.blocks[:full]), f"{request_id} uses other pages: {used}")
        if full < len(run.blocks):
            used, split = sorted(tiers[1].page_ids.tolist()), tiers[1].split
            parts = [
                page * split + part for page in pages_of(run.blocks[full:]) for part in range(split)
            ]
            _require(used == parts, f"{request_id} uses other quantized pages: {used}")
        self._known_pages[request_id] = known
        self.seen["page table"] += 1

    def _check_nobody_is_forgotten(self) -> None:
        """Whoever must be compressed is, a step after the prefix is complete."""
        if self._formula.prefill_blocks is not None:
            return
        complete: dict[tuple[str, int], int] = {}
        for request in self._scheduler.running:
            options = request.sampling_params.extra_args or {}
            pool_blocks = self._manager.rule.pool_blocks - 1
            prefix = self._formula.prefix_blocks(request.num_prompt_tokens, options, pool_blocks)
            state = self._manager.rows[request.request_id]
            if prefix is None or state.run is not None:
                continue
            declared = "kvzip_context_tokens" in options
            end = prefix * self._formula.block_size if declared else request.num_prompt_tokens
            key, computed = (
                (request.request_id, request.num_preemptions),
                request.num_computed_tokens,
            )
            before = self._complete.get(key, computed)
            _require(
                computed <= before,
                f"{key[0]} has {computed} tokens, and its {prefix} blocks are not compressed",
            )
            if computed >= end:
                complete[key] = before
        self._complete = complete


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenInvariantError(message)
