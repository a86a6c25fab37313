"""What a reader sees of a file: text of plain files, HTML and PDF."""

from __future__ import annotations

import codecs
import io
import re

from vllm_kvzip.client.errors import DocumentError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_UNSEEN = ("script", "style", "noscript", "template", "title")
_BLOCKS = (
    "address", "article", "aside", "blockquote", "dd", "div", "dl", "dt", "figcaption", "figure",
    "footer", "h1", "h2", "h3", "h4", "h5", "h6", "header", "hr", "li", "main", "nav", "ol", "p",
    "pre", "section", "table", "tr", "ul",
)  # fmt: skip
_CELLS = ("td", "th")
_BREAK = "\x00"  # no HTML text holds it


def plain_text(name: str, data: bytes) -> str:
    """A text file's text; line ends as they are.

    Raises:
        DocumentError: if it is not text in UTF-8 or UTF-16.
    """
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise DocumentError(
            f"{name} is not text in UTF-8 (byte {error.start}); convert it, or name a text, "
            f"Markdown, HTML or PDF file."
        ) from error
    if "\x00" in text:
        raise DocumentError(f"{name} is a binary file; name a text, Markdown, HTML or PDF file.")
    return text


def html_text(name: str, data: bytes) -> str:
    """What a browser shows of an HTML file: a blank line between blocks, a bar between cells.

    Raises:
        DocumentError: if the package that reads HTML is missing.
    """
    try:
        from bs4 import BeautifulSoup
    except ImportError as error:
        raise DocumentError(_missing(name, "beautifulsoup4")) from error
    soup = BeautifulSoup(data, "html.parser")
    for element in soup(_UNSEEN):
        element.decompose()
    for element in soup("br"):
        element.replace_with("\n")
    for cell in soup(_CELLS):
        if cell.find_next_sibling(_CELLS):
            cell.insert_after(" | ")
    for element in soup(_BLOCKS):
        element.insert_before(_BREAK)
        element.insert_after(_BREAK)
    blocks = (re.sub(r"[^\S\n]+", " ", block).strip() for block in soup.get_text().split(_BREAK))
    return "\n\n".join(block for block in blocks if block)


def pdf_pages(name: str, data: bytes) -> list[str]:
    """Text of each page of a PDF file.

    Raises:
        DocumentError: if it is broken or locked, or the package that reads PDF is missing.
    """
    try:
        from pypdf import PdfReader
        from pypdf.errors import DependencyError, PyPdfError
    except ImportError as error:
        raise DocumentError(_missing(name, "pypdf")) from error
    try:
        texts = [page.extract_text().strip() for page in PdfReader(io.BytesIO(data)).pages]
    except DependencyError as error:
        raise DocumentError(f"{name} is locked, and cannot be opened here: {error}") from error
    except (PyPdfError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        # pypdf meets broken files with any of these
        raise DocumentError(f"{name} cannot be read as PDF: {error}") from error
    # halves of a character outside of Unicode's first plane, which some fonts' tables hold
    return [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts]


def _missing(name: str, package: str) -> str:
    return f"{name} needs the package {package}; pip install 'vllm-kvzip[client]' brings it."
