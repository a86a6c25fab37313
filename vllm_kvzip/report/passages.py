"""A document in passages: sentences, or as much of one as is read at a glance."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FEWEST, MOST = 6, 40
"""Tokens of a passage; a line may be shorter."""
ENDS = (".", "!", "?", ";", ":", '."', ".\u201d", '!"', '?"', ".)")
WIDE_ENDS = ("\u3002", "\uff01", "\uff1f", "\u0964", "\u061f")
"""Of scripts that write no space between sentences, and of some that do."""


def passage_starts(token_texts: Sequence[str], boundary: int) -> list[int]:
    """The first token of each passage.

    A passage ends with its sentence, with its line, at ``boundary``, and after ``MOST`` tokens; in
    a long sentence it ends at a word's end where one is near.

    Args:
        token_texts: of the document.
        boundary: a passage begins here, where compression ends.
    """
    starts: list[int] = []
    start = 0
    for token in range(1, len(token_texts) + 1):
        if token < len(token_texts) and token != boundary:
            length, before, after = token - start, token_texts[token - 1], token_texts[token]
            at_word = after[:1].isspace() or before[-1:].isspace()
            word = before.rstrip()
            ends = (word.endswith(ENDS) and at_word) or word.endswith(WIDE_ENDS)
            is_sentence = ends and length >= FEWEST
            is_line = before.endswith("\n") and not after.startswith("\n")
            is_long = length >= MOST and (at_word or length >= MOST + 8)
            if not (is_sentence or is_line or is_long):
                continue
        starts.append(start)
        start = token
    return starts
