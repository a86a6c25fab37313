"""What one request may ask for: the ``kvzip*`` entries of ``SamplingParams.extra_args``.

In the OpenAI API they are entries of ``vllm_xargs``. They are checked where a request enters, so
that a wrong value is an answer to its client; the scheduler and the workers only read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import RequestError, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping

PREFIX = "kvzip"
CONTEXT_TOKENS = "kvzip_context_tokens"
KNOWN = (CONTEXT_TOKENS,)


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request.

    Attributes:
        context_tokens: the first tokens of the prompt, the context that later requests reuse; only
            they are compressed. None: the whole prompt is.
    """

    context_tokens: int | None = None

    @classmethod
    def read(cls, extra_args: Mapping[str, Any] | None) -> RequestOptions:
        """The options of a request; a value that :func:`check_request` refuses counts as absent.

        Somebody may hand requests to the engine past the checks, and they must not end it.
        """
        value = (extra_args or {}).get(CONTEXT_TOKENS)
        return cls(context_tokens=value) if _is_count(value) else _NONE


_NONE = RequestOptions()


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def check_request(extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> None:
    """Check what a request asks for.

    Args:
        extra_args: of its sampling parameters.
        num_prompt_tokens: length of its prompt.

    Raises:
        RequestError: for an unknown option or a wrong value, in one sentence for the client.
    """
    for name in extra_args or ():
        if name.startswith(PREFIX) and name not in KNOWN:
            raise RequestError(f"There is no option {name}; {suggest(name, KNOWN)}")
    value = (extra_args or {}).get(CONTEXT_TOKENS)
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(
            f"{CONTEXT_TOKENS}={value!r} must be a whole number of tokens, such as 1024."
        )
    if not 0 <= value <= num_prompt_tokens:
        raise RequestError(
            f"{CONTEXT_TOKENS}={value} must lie between 0 and the prompt's length, which is "
            f"{num_prompt_tokens} tokens."
        )
