"""Watch the blocks of vLLM's prefix cache: while a block keeps its hash, nobody may write to it."""

from __future__ import annotations

from typing import Any

import torch


class HashedBlockWatch:
    """Compares the bytes of every hashed block between steps.

    vLLM publishes a block's hash when it schedules the step that computes it, so its bytes count
    from the end of that step. The plugin publishes the blocks of a compressed prefix in the step
    that completes it and writes them at the start of the next one: they count a step later.

    Attributes:
        written: ids of blocks that changed while they kept their hash.
        compared: comparisons made, of blocks of compressed prefixes and of all others.
    """

    def __init__(self, core: Any) -> None:
        cache = core.scheduler.kv_cache_manager
        self._pool = cache.block_pool
        managers = cache.coordinator.single_type_managers
        found = [manager.prefixes for manager in managers if hasattr(manager, "prefixes")]
        self._prefixes = found[0] if found else None
        self._layers = core.model_executor.driver_worker.worker.model_runner.kv_caches
        self._known: dict[
            int, tuple[Any, list[torch.Tensor]]
        ] = {}  # block id -> its hash, and a copy of its bytes
        self._unwritten: dict[int, Any] = {}  # block id -> its hash
        self.written: list[int] = []
        self.compared = {"raw": 0, "compressed": 0}

    def after_step(self, stepped: bool = True) -> None:
        """Look at every hashed block; must follow each step.

        ``stepped`` is false where nothing has been computed since the last look.
        """
        known: dict[int, tuple[Any, list[torch.Tensor]]] = {}
        unwritten: dict[int, Any] = {}
        for block in self._pool.blocks:
            key, number = block.block_hash, block.block_id
            if key is None:
                continue
            compressed = self._prefixes is not None and self._prefixes.owner([block]) is not None
            known_key, copies = self._known.get(number, (None, []))
            if known_key != key:
                if compressed and not (stepped and self._unwritten.get(number) == key):
                    unwritten[number] = key
                else:
                    known[number] = (key, [view.clone() for view in self._bytes(number)])
                continue
            self.compared["compressed" if compressed else "raw"] += 1
            if not all(map(torch.equal, self._bytes(number), copies)):
                self.written.append(number)
                copies = [view.clone() for view in self._bytes(number)]
            known[number] = (key, copies)
        self._known, self._unwritten = known, unwritten

    def scribble(self) -> int:
        """Break the rule, to prove that it is watched: write to a cached block that is free."""
        number = next(n for n in self._known if not self._pool.blocks[n].ref_cnt)
        self._bytes(number)[-1].view(-1)[-1] += 1
        return number

    def _bytes(self, number: int) -> list[torch.Tensor]:
        return [layer[number].view(torch.int32) for layer in self._layers]
