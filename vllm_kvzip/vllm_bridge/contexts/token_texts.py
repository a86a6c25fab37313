"""The text of each token of a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

UNFINISHED = "\ufffd"  # what tokenizers decode a part of a character to
MOST_PENDING = 8
"""Tokens that are decoded together at most; more than the bytes of a character, and of an emoji."""


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """Texts that, joined, are the text of the whole prompt, special tokens included.

    A character of several tokens stands with its last one. Tokens are decoded behind the ones
    before them, since tokenizers write the first word of a text without its space.

    Args:
        tokenizer: with ``decode``.
        token_ids: of the prompt.
    """
    texts: list[str] = []
    start = done = 0  # tokens from ``start`` on are decoded, those before ``done`` have their text
    before = ""
    for end in range(1, len(token_ids) + 1):
        now = tokenizer.decode(list(token_ids[start:end]), skip_special_tokens=False)
        if now.endswith(UNFINISHED) and end - done < MOST_PENDING and end < len(token_ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, done = done, end
        before = tokenizer.decode(list(token_ids[start:done]), skip_special_tokens=False)
    return texts
