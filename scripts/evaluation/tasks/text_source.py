"""Running text that contexts are cut from: files, or what ships."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvzip.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from vllm_kvzip.evaluation.tasks.text_frame import TextFrame

DEFAULT_TEXT = Path(__file__).parent / "evaluation.txt"
PYTHON_DOCS = "python-docs"  # in place of a file: the language reference that Python carries
_SENTENCE = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


class TextSource:
    """A text as sentences and lines.

    Args:
        text: the text.
        frame: whose tokens are counted.

    Attributes:
        pieces: sentences, and lines where a line ends before its sentence does, each with the
            blanks behind it; together they are the text.
        lengths: tokens of each, about.
    """

    def __init__(self, text: str, frame: TextFrame) -> None:
        self.pieces = split_pieces(text)
        self.lengths = [len(frame.ids(piece)) for piece in self.pieces]

    @property
    def num_tokens(self) -> int:
        """Of the whole text, about."""
        return sum(self.lengths)

    def passage(self, rng: np.random.Generator, num_tokens: int) -> list[int]:
        """Numbers of pieces that follow each other, from anywhere, with at least so many tokens.

        The text goes on at its beginning where it ends.

        Raises:
            ConfigError: if the text has not so many tokens.
        """
        if num_tokens > self.num_tokens:
            raise ConfigError(
                f"--text has about {self.num_tokens} tokens, too few for contexts of about "
                f"{num_tokens}; name more files."
            )
        place = int(rng.integers(len(self.pieces)))
        chosen, found = [], 0
        while found < num_tokens:
            chosen.append(place % len(self.pieces))
            found += self.lengths[chosen[-1]]
            place += 1
        return chosen


def split_pieces(text: str) -> list[str]:
    """A text's sentences and lines with what separates them; their concatenation is the text."""
    ends = [match.end() for match in _SENTENCE.finditer(text)]
    cuts = [0, *ends, len(text)]
    return [text[a:b] for a, b in pairwise(cuts) if b > a]


def load_text(names: Sequence[str] | None, context_tokens: int, frame: TextFrame) -> TextSource:
    """The text of some files, in order.

    Args:
        names: paths, or ``python-docs``. None: the text that ships, and ``python-docs`` behind it
            when contexts are longer than that.
        context_tokens: length of the contexts that are to be cut from it.
        frame: whose tokens are counted.

    Raises:
        ConfigError: if a file cannot be read or has no text.
    """
    if names is not None:
        return TextSource("\n\n".join(map(_read, names)), frame)
    shipped = TextSource(_read(str(DEFAULT_TEXT)), frame)
    if context_tokens <= shipped.num_tokens:
        return shipped
    return load_text([str(DEFAULT_TEXT), PYTHON_DOCS], context_tokens, frame)


def _read(name: str) -> str:
    if name == PYTHON_DOCS:
        from pydoc_data.topics import topics

        return "\n\n".join(topics.values())
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {name} cannot be read as UTF-8 text: {error}.") from error
    if not text.strip():
        raise ConfigError(f"--text {name} is empty; name a file with running text.")
    return text
