"""``vllm-kvzip read --report``: a page for each part of the documents that were read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvzip.client.errors import ServerError
from vllm_kvzip.report.explanation import Explanation
from vllm_kvzip.report.page import make_page

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_kvzip.client import ContextLibrary
    from vllm_kvzip.client.library import Reading

LONGEST_NAME = 80  # characters of a document's name in that of a file


def write_pages(
    library: ContextLibrary,
    readings: Sequence[Reading],
    folder: Path,
    keep_ratio: float | None,
    on_progress: Callable[[int, int, str], None] = lambda number, count, name: None,
) -> list[str]:
    """Let the server explain each part that is compressed, and write what it kept as pages.

    Args:
        library: that read the documents.
        readings: the documents.
        folder: for the pages.
        keep_ratio: of the library; the server's if None.
        on_progress: called with a page's number, how many there are, and its title.

    Returns:
        the pages' paths.

    Raises:
        ServerError: if the server cannot explain, or its answer is not understood.
        OSError: if a page cannot be written.
    """
    wanted = [
        (f"{number}-{_file_name(reading.document.name)}-{place}.html", part, place, reading)
        for number, reading in enumerate(readings, 1)
        for place, part in enumerate(reading.parts, 1)
        if not part.left_alone
    ]
    paths = []
    for number, (name, part, place, reading) in enumerate(wanted, 1):
        title = f"{reading.document.name}, part {place} of {len(reading.parts)}"
        on_progress(number, len(wanted), title)
        messages = [{"role": "user", "content": part.part.text}]
        told = library.run(library.library.server.explain(messages, keep_ratio))
        try:
            page = make_page(Explanation.read(told), title)
        except ValueError as error:
            raise ServerError(str(error)) from error
        (folder / name).write_text(page, encoding="utf-8")
        paths.append(str(folder / name))
    return paths


def _file_name(name: str) -> str:
    """A document's name without what a file system may not take."""
    return re.sub(r"[^\w.-]+", "_", Path(name).name)[:LONGEST_NAME]
