"""What is shown while documents are read and questions are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import TaskID

LONGEST = 60  # characters of a question


class Progress:
    """A bar for each document and one for the questions, on standard error.

    Args:
        shown: whether anything is drawn.
    """

    def __init__(self, *, shown: bool) -> None:
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def read(self, name: str, done: int, count: int) -> None:
        """So many parts of a document are read."""
        self._show(f"read {name}", f"read {name}", done, count)

    def ask(self, number: int, count: int, question: str) -> None:
        """A question is asked now."""
        self._show("ask", f"ask {question[:LONGEST]}", number, count)

    def explain(self, number: int, count: int, title: str) -> None:
        """A page about a part is made now."""
        self._show("explain", f"explain {title[:LONGEST]}", number, count)

    def _show(self, key: str, text: str, done: int, count: int) -> None:
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(text, total=count)
        self._bars.update(self._tasks[key], description=text, completed=done)
