"""A document in parts that a server can hold, cut where a reader would cut."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_kvzip.client.errors import DocumentError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Count = Callable[[str], Awaitable[int]]

SLICE_CHARACTERS = 200_000  # are counted at once
SEARCHED_SHARE = 0.35  # of a part's end in which a paragraph is looked for
TARGET_EXCESS = 1.15  # of a part over its share of the rest
NUM_ENDS = 3  # paragraph ends from which the one nearest a block's edge is taken
_BOUNDARIES = tuple(
    re.compile(pattern)
    for pattern in (r"\n[^\S\n]*\n\s*", r"\n", r"[.!?][\"')\]]*\s+|[\u3002\uff01\uff1f]", r"\s+")
)
"""Paragraphs, lines, sentences, words."""


@dataclass(frozen=True)
class Part:
    """A part of a document's text.

    Attributes:
        number: from 0.
        start, end: its characters in the document's text; no blanks at either end.
        text: these characters.
        tokens: by the server's tokenizer.
    """

    number: int
    start: int
    end: int
    text: str
    tokens: int


@dataclass(frozen=True)
class PartLimits:
    """How large parts may be.

    Attributes:
        most_tokens: of a part.
        most_parts: of a document.
        block_size: tokens of a KV cache block, of which only whole ones are compressed.
        head_tokens: that stand before a part in its context.
    """

    most_tokens: int
    most_parts: int = 256
    block_size: int = 1
    head_tokens: int = 0


async def split(name: str, text: str, count: Count, limits: PartLimits) -> list[Part]:
    """Parts of about equal length that hold the whole text, blanks between them aside.

    A part ends with a paragraph where one ends in its last third, else with a line, a sentence or a
    word; of several paragraph ends the one is taken behind which the fewest tokens of a block
    are left over.

    Args:
        name: of the document, for an error.
        text: of the document.
        count: tokens of a text, by the server's tokenizer.
        limits: of the parts.

    Raises:
        DocumentError: if there would be too many parts.
    """
    total = await _total_tokens(name, text, count, limits)
    parts: list[Part] = []
    start, left = 0, total
    while text[start:].strip():
        start += len(text[start:]) - len(text[start:].lstrip())
        num_left = max(1, math.ceil(left / limits.most_tokens))
        wanted = min(limits.most_tokens, math.ceil(left / num_left * TARGET_EXCESS))
        wanted = max(wanted, 1)
        end, tokens = await _end(text, start, wanted, total / len(text), count, limits)
        body = text[start:end].rstrip()
        parts.append(Part(len(parts), start, start + len(body), body, tokens))
        if len(parts) > limits.most_parts:
            raise DocumentError(_too_long(name, total, limits))
        start, left = end, left - tokens
    return parts


async def _total_tokens(name: str, text: str, count: Count, limits: PartLimits) -> int:
    """Tokens of a text, about; counted in slices, and no further than the limits go."""
    total = 0
    for begin in range(0, len(text), SLICE_CHARACTERS):
        total += await count(text[begin : begin + SLICE_CHARACTERS])
        if total > limits.most_parts * limits.most_tokens:
            share = min(1.0, (begin + SLICE_CHARACTERS) / len(text))
            raise DocumentError(_too_long(name, round(total / share), limits))
    return max(total, 1)


def _too_long(name: str, tokens: int, limits: PartLimits) -> str:
    return (
        f"{name} has {tokens:,} tokens (estimated), more than {limits.most_parts} parts of "
        f"{limits.most_tokens:,} tokens; allow more parts, or ask about a part of it."
    )


async def _end(
    text: str, start: int, wanted: int, per_character: float, count: Count, limits: PartLimits
) -> tuple[int, int]:
    """Where a part that begins at ``start`` ends, and its tokens, at most ``wanted``."""
    rest = await _tokens_if_short(text, start, limits.most_tokens, per_character, count)
    if rest is not None:
        return len(text), rest
    length = max(1, int(wanted / per_character))
    while True:
        ends = boundaries(text, start, min(len(text), start + length))
        fitting = []
        for end in ends:
            tokens = await count(text[start:end].rstrip())
            if tokens <= wanted:
                fitting.append(((tokens + limits.head_tokens) % limits.block_size, end, tokens))
        if fitting:
            _, end, tokens = min(fitting, key=lambda found: (found[0], -found[1]))
            return end, tokens
        if length == 1:
            return start + 1, tokens  # one character that is longer than a part
        length = max(1, min(int(length * 0.95 * wanted / tokens), length - 1))


async def _tokens_if_short(
    text: str, start: int, most: int, per_character: float, count: Count
) -> int | None:
    """Tokens of the rest of a text if one part holds it."""
    rest = text[start:].rstrip()
    if len(rest) * per_character > 2 * most:
        return None
    tokens = await count(rest)
    return tokens if tokens <= most else None


def boundaries(text: str, start: int, high: int) -> list[int]:
    """Where a part of ``text[start:high]`` may end, the last place first, a few at most.

    All are of the best kind that there is in the part's last third: paragraphs, lines, sentences,
    words, or ``high`` itself.
    """
    low = high - max(1, int(SEARCHED_SHARE * (high - start)))
    for boundary in _BOUNDARIES:
        ends = [match.end() for match in boundary.finditer(text, low, high) if match.end() > start]
        if ends:
            return ends[: -NUM_ENDS - 1 : -1] if boundary is _BOUNDARIES[0] else ends[:-2:-1]
    return [high]
