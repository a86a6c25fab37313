"""Calls to a server that may be busy or gone: tried again, a bounded number of times."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import openai

from vllm_kvzip.client.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

T = TypeVar("T")

PASSING = (408, 409, 429, 502, 503, 504)
"""HTTP statuses that say: later, perhaps."""


@dataclass(frozen=True)
class Retries:
    """How often a call is tried again, and how long it may take.

    Attributes:
        most: tries after the first one.
        first_pause_seconds: before the first of them; each further pause is twice as long.
        longest_pause_seconds: also where the server asks for more in ``Retry-After``.
        timeout_seconds: of one try. Its request is closed then, and the server drops it.
    """

    most: int = 4
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 8.0
    timeout_seconds: float = 600.0

    def pause_seconds(self, tries: int, error: Exception) -> float:
        """How long to wait after so many tries that failed, at least 1.

        Up to a quarter less than what is due, by chance, so that many clients do not come back
        at the same moment.
        """
        due = self.first_pause_seconds * 2.0 ** (tries - 1)
        headers = getattr(getattr(error, "response", None), "headers", {})
        with contextlib.suppress(ValueError):  # a date, which no vLLM server sends
            due = max(due, float(headers.get("retry-after", 0)))
        return min(due, self.longest_pause_seconds) * random.uniform(0.75, 1.0)


async def retried(
    call: Callable[[], Awaitable[T]], retries: Retries, on_retry: Callable[[], None]
) -> T:
    """What a call returns, after as many tries as it takes.

    Args:
        call: makes one try through the ``openai`` client.
        retries: how often.
        on_retry: called before each further try.

    Raises:
        ServerError: if no try succeeded, or a refusal will not pass by itself.
    """
    tries = 0
    while True:
        try:
            return await call()
        except openai.APIStatusError as error:
            tries += 1
            if error.status_code not in PASSING or tries > retries.most:
                said, kind = sentence(error, tries), _kind(error.body)
                raise ServerError(said, error.status_code, kind) from error
            failed: Exception = error
        except openai.APIConnectionError as error:  # timeouts too
            tries += 1
            if tries > retries.most:
                raise ServerError(_no_answer(error, tries, retries)) from error
            failed = error
        except (ValueError, openai.APIResponseValidationError) as error:
            raise ServerError(f"The server answered with what is no JSON: {error}") from error
        on_retry()
        await asyncio.sleep(retries.pause_seconds(tries, failed))


def sentence(error: openai.APIStatusError, tries: int) -> str:
    """What a server said when it refused."""
    said = _message(error.body) or error.response.text.strip()[:200] or error.response.reason_phrase
    often = f" {tries} times" if tries > 1 else ""
    return f"{error.request.url} answered HTTP {error.status_code}{often}: {said}"


def _kind(body: Any) -> str:
    """The type of an error of the OpenAI API, whose client takes it out of its envelope."""
    if isinstance(body, dict):
        return str(body.get("type") or _kind(body.get("error")))
    return ""


def _message(body: Any) -> str | None:
    """The message of an error of the OpenAI API, at whichever depth."""
    if isinstance(body, str):
        try:
            body = json.loads(body)
        except ValueError:
            return None
    if isinstance(body, dict):
        found = body.get("message") or body.get("detail")
        return str(found) if found else _message(body.get("error"))
    return None


def _no_answer(error: openai.APIConnectionError, tries: int, retries: Retries) -> str:
    times = "once" if tries == 1 else f"{tries} times"
    if isinstance(error, openai.APITimeoutError):
        return (
            f"{error.request.url} did not answer within {retries.timeout_seconds:g} s, tried "
            f"{times}."
        )
    reason = error.__cause__ or error
    return f"{error.request.url} cannot be reached, tried {times} ({reason or 'no reason given'})."
