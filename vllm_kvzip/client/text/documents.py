"""A document: its text, a name, and where its pages begin."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from vllm_kvzip.client.errors import DocumentError
from vllm_kvzip.client.text.formats import html_text, pdf_pages, plain_text

PDF_MAGIC = b"%PDF-"
HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_HTML_STARTS = (b"<!doctype html", b"<html")
_PAGE_BREAK = "\n\n"


@dataclass(frozen=True)
class Document:
    """Text to ask about. Character ranges of quotes count in ``text``.

    Attributes:
        name: for people, such as a file's name.
        text: of a plain text or Markdown file as it stands there; of HTML and PDF what a reader
            sees.
        page_starts: of a PDF, where in ``text`` each page begins.
    """

    name: str
    text: str
    page_starts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise DocumentError(f"{self.name} holds no text.")
        try:
            self.text.encode()
        except UnicodeEncodeError as error:
            raise DocumentError(
                f"{self.name} holds half a character at {error.start}, which no encoding can write."
            ) from error

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def page(self, place: int) -> int | None:
        """Number of the page on which a character stands, from 1; None: there are no pages."""
        return bisect_right(self.page_starts, place) or None


def read_document(path: str | Path) -> Document:
    """A file as a document: plain text, Markdown, HTML or PDF, told apart by name and beginning.

    Raises:
        DocumentError: if it cannot be read, is binary or empty, or its format needs a package that
            is missing.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not data.strip():
        raise DocumentError(f"{path} is empty.")
    name = str(path)
    if path.suffix.lower() == ".pdf" or data.startswith(PDF_MAGIC):
        pages = pdf_pages(name, data)
        starts, place = [], 0
        for page in pages:
            starts.append(place)
            place += len(page) + len(_PAGE_BREAK)
        text = _PAGE_BREAK.join(pages)
        if not text.strip():
            raise DocumentError(f"{name} holds no text; are its pages pictures?")
        return Document(name, text, tuple(starts))
    if path.suffix.lower() in HTML_SUFFIXES or data[:64].lstrip().lower().startswith(_HTML_STARTS):
        return Document(name, html_text(name, data))
    return Document(name, plain_text(name, data))
