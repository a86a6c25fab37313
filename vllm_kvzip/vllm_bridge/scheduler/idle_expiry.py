"""Scheduler side: drop expired prefixes also while the engine has nothing to do.

An engine without requests runs no step, so a thread watches the time. vLLM's scheduler and block
pool are made for one thread. So every call into them holds a lock while this thread exists.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import CompressedPrefixCache


class IdleExpiry:
    """Drops prefixes of a cache as soon as their time to live is over.

    Args:
        prefixes: the cache; the thread ends when nothing else refers to it.
        ttl_seconds: its time to live.
        lock: held during every call into the block pool.
    """

    def __init__(
        self,
        prefixes: CompressedPrefixCache,
        ttl_seconds: float,
        lock: AbstractContextManager[object],
    ) -> None:
        self._stopped = threading.Event()
        arguments = (weakref.ref(prefixes), ttl_seconds, lock, self._stopped)
        threading.Thread(target=_run, args=arguments, name="kvzip-expiry", daemon=True).start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()


def _run(
    cache: weakref.ref[CompressedPrefixCache],
    ttl_seconds: float,
    lock: AbstractContextManager[object],
    stopped: threading.Event,
) -> None:
    wait = ttl_seconds
    while not stopped.wait(min(wait, threading.TIMEOUT_MAX)):
        prefixes = cache()
        if prefixes is None:
            return
        with lock:
            # A prefix that is added later lives at least ``ttl_seconds``.
            wait = prefixes.expire() or ttl_seconds
        del prefixes
