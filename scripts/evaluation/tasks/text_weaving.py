"""Hide sentences in running text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_kvzip.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from vllm_kvzip.evaluation.tasks.text_frame import TextFrame
    from vllm_kvzip.evaluation.tasks.text_source import TextSource

USED_SHARE = 0.95  # of a context; what is asked for stands in it, whatever the tokenizer counts
_ENDS_SENTENCE = re.compile(r"[.!?][\"')\]]*\s+$")


@dataclass(frozen=True)
class Weaver:
    """Cuts contexts from a text and hides sentences in them.

    Attributes:
        source: the text.
        frame: what stands around it.
    """

    source: TextSource
    frame: TextFrame

    def pieces(self, rng: np.random.Generator, num_tokens: int) -> tuple[list[str], list[int]]:
        """Running text for a context of so many tokens, a little more than it takes.

        Pieces have fewer tokens together than one by one.

        Returns:
            Its pieces, and how many tokens of text stand before each of them, about.

        Raises:
            ConfigError: if the text is too short.
        """
        chosen = self.source.passage(rng, num_tokens + num_tokens // 16 + 16)
        before, starts = 0, []
        for number in chosen:
            starts.append(before)
            before += self.source.lengths[number]
        return [self.source.pieces[number] for number in chosen], starts

    def context(
        self, rng: np.random.Generator, num_tokens: int, sentences: Sequence[str]
    ) -> list[int]:
        """A context with sentences in it, in order, one in each of as many equal parts.

        Args:
            rng: says where.
            num_tokens: exact length, with what stands before the document.
            sentences: to hide; between two sentences of the text, where it has any.

        Returns:
            Token ids.

        Raises:
            ConfigError: if they have no room or the text is too short.
        """
        hidden = sum(len(self.frame.ids(f"{sentence} ")) for sentence in sentences)
        room = num_tokens - len(self.frame.head_ids) - hidden
        if room < len(sentences):
            raise ConfigError(
                f"contexts of {num_tokens} tokens have no room for {len(sentences)} sentences with "
                f"facts; raise --context-tokens or lower --questions."
            )
        pieces, starts = self.pieces(rng, room + hidden // 8)
        usable = [i for i, start in enumerate(starts) if start <= USED_SHARE * room]
        ends = [i for i in usable if i and _ENDS_SENTENCE.search(pieces[i - 1])] or usable
        parts = []
        last = 0
        for number, sentence in enumerate(sentences):
            low, high = (USED_SHARE * room * n / len(sentences) for n in (number, number + 1))
            near = [i for i in ends if low <= starts[i] < high]
            middle = (low + high) / 2
            place = (
                int(rng.choice(near)) if near else min(ends, key=lambda i: abs(starts[i] - middle))
            )
            place = max(place, last)
            parts += [*pieces[last:place], f"{sentence} "]
            last = place
        text = "".join(parts)
        if len(self.frame.context(text, num_tokens + 1)) > num_tokens:
            raise ConfigError(
                f"contexts of {num_tokens} tokens have no room for {len(sentences)} sentences with "
                f"facts; raise --context-tokens or lower --questions."
            )
        return self.frame.context(text + "".join(pieces[last:]), num_tokens)
