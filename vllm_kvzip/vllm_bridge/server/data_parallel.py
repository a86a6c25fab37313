"""Server side: the engines among which a server shares its requests (data parallelism).

Each has a KV cache of its own, and vLLM sends a request to the one with the least to do.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


def num_engines(engine: Any) -> int:
    """How many engines a server's client sends requests to.

    Args:
        engine: vLLM's ``AsyncLLM``.
    """
    return len(getattr(engine.engine_core, "core_engines", (None,)))


async def on_each(engine: Any, ask: Callable[[int | None], Awaitable[Any]]) -> list[Any]:
    """What each engine answers, in rank order.

    Args:
        engine: vLLM's ``AsyncLLM``.
        ask: gets what vLLM's ``generate`` takes as ``data_parallel_rank``.
    """
    count = num_engines(engine)
    ranks = range(count) if count > 1 else [None]
    return list(await asyncio.gather(*map(ask, ranks)))


async def call_workers(engine: Any, method: str) -> list[Any]:
    """What a method of the first worker of each engine returns, in rank order.

    Args:
        engine: vLLM's ``AsyncLLM``.
        method: of our worker, without arguments.
    """
    if num_engines(engine) == 1:
        of_engines = [await engine.collective_rpc(method)]
    else:  # vLLM's own returns what the first engine says
        of_engines = await engine.engine_core.call_utility_all_async(
            "collective_rpc", method, None, (), None
        )
    return [of_workers[0] for of_workers in of_engines]
