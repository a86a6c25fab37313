"""How a model is asked to repeat its context: by its user's words, its profile's, or KVzip's.

A chat model repeats best when it is its turn to speak. Where the tokenizer has a chat template, the
default wording therefore ends the user's turn and begins the assistant's. The end of the chunk
before, which tells where to go on, then begins the answer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip.planning.reconstruction import FIRST_REPEAT_PROMPT, LATER_REPEAT_PROMPT

if TYPE_CHECKING:
    from vllm_kvzip.head_profiles.head_profile import Provenance

logger = logging.getLogger(__name__)

_MESSAGE = "kvzip-message"  # stands for what a user writes


@dataclass(frozen=True)
class RepeatWording:
    """What is written behind a context.

    Attributes:
        first: asks for its first chunk.
        later: asks for the others; the end of the chunk before follows it.
    """

    first: str
    later: str

    def token_ids(self, tokenizer: Any) -> tuple[list[int], list[int]]:
        """Token ids of both.

        Args:
            tokenizer: has ``encode``.

        Raises:
            ValueError: if one of them has no token.
        """
        first, later = (
            list(tokenizer.encode(text, add_special_tokens=False))
            for text in (self.first, self.later)
        )
        if not first or not later:
            raise ValueError(
                f"{self.first!r} has no token in this model's vocabulary; choose another wording."
            )
        return first, later


def around_message(tokenizer: Any) -> tuple[str, str]:
    """What a chat template writes before a user's message, and between it and the answer.

    Thinking models are asked for an answer without thoughts.

    Args:
        tokenizer: has ``apply_chat_template`` as transformers' tokenizers have.

    Returns:
        both; empty where there is no template, or none that works with one user's message.
    """
    try:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MESSAGE}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except Exception as error:  # a template is a program that came with the model
        logger.debug("No chat template can be used: %s", error)
        return "", ""
    if not isinstance(text, str) or _MESSAGE not in text:
        return "", ""
    before, _, behind = text.rpartition(_MESSAGE)
    return before, behind if behind.strip() else ""


def repeat_wording(own: str | None, provenance: Provenance | None, tokenizer: Any) -> RepeatWording:
    """The wording for a model.

    Args:
        own: of the user, taken literally.
        provenance: of the model's profile. The wording that made it is known to work and is taken
            literally, as far as the profile names it.
        tokenizer: see :func:`around_message`.
    """
    if own is not None:
        return RepeatWording(own, own)
    if provenance is not None and (first := provenance.repeat_prompt) is not None:
        usual = LATER_REPEAT_PROMPT if first == FIRST_REPEAT_PROMPT else first
        return RepeatWording(first, provenance.later_repeat_prompt or usual)
    _, behind = around_message(tokenizer)
    return RepeatWording(FIRST_REPEAT_PROMPT + behind, LATER_REPEAT_PROMPT + behind)
