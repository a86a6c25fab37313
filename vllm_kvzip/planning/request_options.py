"""What one request may ask for: the ``kvzip*`` entries of ``SamplingParams.extra_args``.

In the OpenAI API they are entries of ``vllm_xargs``. They are checked where a request enters, so
that a wrong value is an answer to its client; the scheduler and the workers only read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import RequestError, suggest

if TYPE_CHECKING:
    from collections.abc import Mapping

SWITCH = "kvzip"
KEEP_RATIO = "kvzip_keep_ratio"
CONTEXT_TOKENS = "kvzip_context_tokens"
DECODE_BUDGET = "kvzip_decode_budget"
QUALITY_LOSS = "kvzip_quality_loss"
KNOWN = (SWITCH, KEEP_RATIO, CONTEXT_TOKENS, DECODE_BUDGET, QUALITY_LOSS)
LEFT_ALONE = "kvzip_left_alone"
"""Set by the scheduler alone, where compressing has failed or has no room: why the prompt is left
alone."""


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request.

    Attributes:
        context_tokens: the first tokens of the prompt, the context that later requests reuse; only
            they are compressed. None: the whole prompt is.
        keep_ratio: kept / all KV pairs of the prefix, in (0, 1]; None: the server's.
        is_off: neither compress the prompt nor start from a compressed prefix.
        max_output_tokens: the most tokens the request generates; None: unknown.
        decode_budget: tokens whose KV pairs it holds while it generates; 0: as many as there are;
            None: the server's.
        left_alone: why it is off, one of ``metrics.SKIP_REASONS``; None: its client said so.
        quality_loss: nats a token that compressing may cost; 0: the keep ratio alone decides; None:
            the server's.
    """

    context_tokens: int | None = None
    keep_ratio: float | None = None
    is_off: bool = False
    max_output_tokens: int | None = None
    left_alone: str | None = None
    decode_budget: int | None = None
    quality_loss: float | None = None

    @classmethod
    def read(
        cls, extra_args: Mapping[str, Any] | None, max_output_tokens: int | None = None
    ) -> RequestOptions:
        """The options of a request; a value that :func:`check_request` refuses counts as absent.

        Programs can hand a request to the engine without that check. It must not crash the engine.
        """
        given = extra_args or {}
        context, ratio = given.get(CONTEXT_TOKENS), given.get(KEEP_RATIO)
        budget, loss = given.get(DECODE_BUDGET), given.get(QUALITY_LOSS)
        return cls(
            context_tokens=context if _is_count(context) else None,
            keep_ratio=ratio if _is_ratio(ratio) else None,
            is_off=given.get(SWITCH) == "off" or LEFT_ALONE in given,
            max_output_tokens=max_output_tokens,
            left_alone=given.get(LEFT_ALONE),
            decode_budget=0 if budget == "off" else budget if _is_budget(budget) else None,
            quality_loss=0.0 if loss == "off" else loss if _is_positive(loss) else None,
        )


DEFAULT = RequestOptions()


def has_options(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request asks for anything of ours."""
    return any(name.startswith(SWITCH) and name != LEFT_ALONE for name in extra_args or ())


def check_request(extra_args: Mapping[str, Any] | None, num_prompt_tokens: int) -> None:
    """Check what a request asks for.

    Args:
        extra_args: of its sampling parameters.
        num_prompt_tokens: length of its prompt.

    Raises:
        RequestError: for an unknown option or a wrong value, in one sentence for the client.
    """
    given = extra_args or {}
    for name in given:
        if name.startswith(SWITCH) and name not in KNOWN:
            raise RequestError(f"There is no option {name}; {suggest(name, KNOWN)}")
    switch = given.get(SWITCH, "on")
    if switch not in ("on", "off"):
        raise RequestError(f'{SWITCH}={switch!r} must be "on" or "off".')
    ratio = given.get(KEEP_RATIO)
    if ratio is not None and not _is_ratio(ratio):
        raise RequestError(
            f"{KEEP_RATIO}={ratio!r} must be a number above 0 and up to 1, such as 0.5."
        )
    budget = given.get(DECODE_BUDGET)
    if budget not in (None, "off") and not _is_budget(budget):
        raise RequestError(
            f'{DECODE_BUDGET}={budget!r} must be a number of tokens, such as 4096, or "off".'
        )
    loss = given.get(QUALITY_LOSS)
    if loss not in (None, "off") and not _is_positive(loss):
        raise RequestError(
            f'{QUALITY_LOSS}={loss!r} must be a number of nats above 0, such as 0.02, or "off".'
        )
    tokens = given.get(CONTEXT_TOKENS)
    if tokens is None:
        return
    if isinstance(tokens, bool) or not isinstance(tokens, int):
        raise RequestError(
            f"{CONTEXT_TOKENS}={tokens!r} must be a whole number of tokens, such as 1024."
        )
    if not 0 <= tokens <= num_prompt_tokens:
        raise RequestError(
            f"{CONTEXT_TOKENS}={tokens} must lie between 0 and the prompt's length, which is "
            f"{num_prompt_tokens} tokens."
        )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_budget(value: Any) -> bool:
    return _is_count(value) and value > 0


def _is_ratio(value: Any) -> bool:
    return _is_positive(value) and value <= 1


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < inf


def options_of(params: Any) -> RequestOptions:
    """What a request asks for; scheduler and workers see the same parameters.

    Args:
        params: vLLM's ``SamplingParams``; None for requests that generate nothing.
    """
    if params is None:
        return DEFAULT
    return RequestOptions.read(params.extra_args, params.max_tokens)
