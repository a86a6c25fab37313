"""The same without ``await``: for scripts, and whoever has no event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar

from vllm_kvzip.client.asking.reader import AsyncReader
from vllm_kvzip.client.errors import ClientError
from vllm_kvzip.client.library import AsyncContextLibrary
from vllm_kvzip.client.server import Server

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence
    from pathlib import Path
    from types import TracebackType

    from vllm_kvzip.client.asking.answers import Answer
    from vllm_kvzip.client.library import LibraryCounts, Reading
    from vllm_kvzip.client.retries import Retries
    from vllm_kvzip.client.text.documents import Document

T = TypeVar("T")


class ContextLibrary:
    """:class:`AsyncContextLibrary` on a server of its own; use it in a ``with`` statement.

    Args:
        url: of the server, such as ``http://localhost:8000``.
        api_key: of the server, if it has one.
        model: to ask; its first one unless given.
        concurrency: calls that run at the same time, at most.
        retries: how often a call is tried again.
        options: of :class:`AsyncContextLibrary`.

    Attributes:
        library: what runs.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        concurrency: int = 16,
        retries: Retries | None = None,
        **options: Any,
    ) -> None:
        self._runner = asyncio.Runner()
        server = Server(url, api_key=api_key, model=model, concurrency=concurrency, retries=retries)
        self.library = AsyncContextLibrary(server, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self.run(self.library.server.close())
        self._runner.close()

    @property
    def counts(self) -> LibraryCounts:
        """What it did so far."""
        return self.library.counts

    def read(self, source: Document | str | Path) -> Reading:
        """See :meth:`AsyncContextLibrary.read`."""
        return self.run(self.library.read(source))

    def run(self, call: Coroutine[Any, Any, T]) -> T:
        """What a call of the library or of a reader returns.

        Raises:
            ClientError: if an event loop is running already.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._runner.run(call)
        call.close()
        raise ClientError(
            "An event loop is running here, as in a notebook; use AsyncContextLibrary and "
            "AsyncReader with await."
        )


class Reader:
    """:class:`AsyncReader` without ``await``.

    Args:
        library: that read the documents.
        readings: the documents.
        options: of :class:`AsyncReader`.
    """

    def __init__(
        self, library: ContextLibrary, readings: Sequence[Reading], **options: Any
    ) -> None:
        self._library = library
        self.reader = AsyncReader(library.library, readings, **options)

    def ask(self, question: str, *, verify: bool = False) -> Answer:
        """See :meth:`AsyncReader.ask`."""
        return self._library.run(self.reader.ask(question, verify=verify))

    def ask_all(self, questions: Sequence[str], *, verify: bool = False) -> list[Answer]:
        """Answers to several questions, asked at the same time, in order."""
        return self._library.run(self._all(questions, verify))

    async def _all(self, questions: Sequence[str], verify: bool) -> list[Answer]:
        from vllm_kvzip.client.together import all_of

        return await all_of(self.reader.ask(question, verify=verify) for question in questions)
