"""How other processes ask an engine to export and import contexts.

vLLM's clients call methods of ``EngineCore`` by name (``call_utility``), which run in the engine's
own thread between two steps. :func:`install_calls` adds ours to the class, in processes whose
engine compresses. An answer is plain values, or a ``Future`` of them, which vLLM waits for while
the engine goes on. What is refused is an answer too, so that vLLM logs no traceback.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import ContextFileError, NoContextFileError, NotYetError
from vllm_kvzip.vllm_bridge.contexts.transfers import ContextTransfers
from vllm_kvzip.vllm_bridge.symbols import EngineCore

if TYPE_CHECKING:
    from collections.abc import Callable

SAVE, OPEN, PLACE, LIST = (f"kvzip_{verb}" for verb in ("save", "open", "place", "list_files"))
_TRANSFERS = "_kvzip_transfers"
_REFUSED, _KIND = "kvzip_refused", "kvzip_kind"
_KINDS = {kind.__name__: kind for kind in (ContextFileError, NoContextFileError, NotYetError)}
PATIENCE_SECONDS, PAUSE_SECONDS = 10.0, 0.02


def install_calls() -> None:
    """Add our methods to ``EngineCore``; idempotent.

    Symptom without it: a client can reach workers, and of the scheduler only what vLLM's own
    methods do. Safe: four new names, no method of vLLM's changes. Remove when vLLM lets a scheduler
    answer calls of its own.
    """
    for name, call in ((SAVE, _save), (OPEN, _open), (PLACE, _place), (LIST, _list)):
        setattr(EngineCore, name, call)


# vLLM counts the parameters of what it calls, so each has its own.


def _save(core: EngineCore, context_id: str, keep_ratio: float | None, name: str | None) -> Any:
    return _answer(core, lambda transfers: transfers.save(context_id, keep_ratio, name))


def _open(core: EngineCore, name: str) -> Any:
    return _answer(core, lambda transfers: transfers.open(name))


def _place(core: EngineCore, ticket: int) -> Any:
    return _answer(core, lambda transfers: transfers.place(ticket))


def _list(core: EngineCore) -> Any:
    return _answer(core, lambda transfers: transfers.listed())


def _answer(core: EngineCore, call: Callable[[ContextTransfers], Any]) -> Any:
    try:
        with core.scheduler.kvzip_runs() as runs:
            if getattr(core, _TRANSFERS, None) is None:
                setattr(core, _TRANSFERS, ContextTransfers(core, runs))
            found = call(getattr(core, _TRANSFERS))
    except ContextFileError as error:
        return _refusal(error)
    return _told(found) if isinstance(found, Future) else found


def _told(work: Future[dict[str, Any]]) -> Future[dict[str, Any]]:
    """The same, with a refusal as its result."""
    told: Future[dict[str, Any]] = Future()

    def done(work: Future[dict[str, Any]]) -> None:
        error = work.exception()
        if error is None:
            told.set_result(work.result())
        elif isinstance(error, ContextFileError):
            told.set_result(_refusal(error))
        else:
            told.set_exception(error)

    work.add_done_callback(done)
    return told


def _refusal(error: ContextFileError) -> dict[str, Any]:
    return {_REFUSED: str(error), _KIND: type(error).__name__}


def _checked(answer: dict[str, Any]) -> dict[str, Any]:
    if _REFUSED in answer:
        raise _KINDS[answer[_KIND]](answer[_REFUSED])
    return answer


async def ask(engine: Any, method: str, *args: Any) -> dict[str, Any]:
    """What an engine answers, for its API server; waits for the engine's next step where it must.

    Args:
        engine: vLLM's ``AsyncLLM``.
        method: one of the names above.
        args: plain values.

    Raises:
        ContextFileError: in one sentence for the client.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return _checked(await engine.engine_core.call_utility_async(method, *args))
        except NotYetError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(PAUSE_SECONDS)


async def import_file(engine: Any, name: str) -> dict[str, Any]:
    """Open a file and put its context into the cache; see :class:`ContextTransfers`."""
    opened = await ask(engine, OPEN, name)
    return await ask(engine, PLACE, opened["ticket"])


def export_context(
    llm: Any, context_id: str, name: str | None = None, keep_ratio: float | None = None
) -> dict[str, Any]:
    """Write a compressed context of an ``LLM`` to a file of its ``contexts_dir``.

    Args:
        llm: vLLM's ``LLM``, which compresses.
        context_id: as ``llm.collective_rpc("kvzip_contexts")`` lists it.
        name: of the file; None: the id.
        keep_ratio: of the context, where several have that id; None: the server's own.

    Raises:
        ContextFileError: in one sentence.
    """
    return _ask_llm(llm, SAVE, context_id, keep_ratio, name)


def import_context(llm: Any, name: str) -> dict[str, Any]:
    """Bring the context of a file into the prefix cache of an ``LLM``; see :func:`export_context`.

    Returns:
        among others ``send``: what later requests name in ``SamplingParams.extra_args``, under
        ``vllm_xargs``.
    """
    return _ask_llm(llm, PLACE, _ask_llm(llm, OPEN, name)["ticket"])


def _ask_llm(llm: Any, method: str, *args: Any) -> dict[str, Any]:
    """As :func:`ask`; an engine of this process makes its steps only when it is told to."""
    client = llm.llm_engine.engine_core
    is_here = not hasattr(client, "call_utility")
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        found: Any = getattr(client.engine_core, method)(*args) if is_here else None
        if isinstance(found, Future):
            found = found.result()
        try:
            return _checked(found if is_here else client.call_utility(method, *args))
        except NotYetError:
            if time.monotonic() > deadline:
                raise
        if is_here:
            llm.llm_engine.step()
        else:
            time.sleep(PAUSE_SECONDS)
