"""Errors a user can meet. Each message is one sentence that says what was wrong and what to do."""

import difflib
from collections.abc import Iterable


class KVzipError(ValueError):
    """Base of the errors below; a ``ValueError`` because each one is about a value given."""


class ConfigError(KVzipError):
    """A setting is wrong."""


class ProfileError(KVzipError):
    """A head-budget profile is missing, broken, or made for another model."""


class UnsupportedError(KVzipError):
    """The model, the platform or another vLLM feature in use cannot be combined with us."""


class RequestError(KVzipError):
    """A request asks for something that cannot be; the client gets the message."""


class LeftAloneError(RequestError):
    """A context cannot be compressed, and is used as it is.

    Args:
        message: one sentence.
        reason: one of ``metrics.SKIP_REASONS``.

    Attributes:
        TYPE: by which a client of the HTTP endpoint tells it from other refusals.
    """

    TYPE = "kvzip_left_alone"

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ContextFileError(KVzipError):
    """A context cannot be written to a file, or a file cannot be used."""


class NoContextFileError(ContextFileError):
    """There is no such file, or no such context."""


class NotYetError(ContextFileError):
    """The engine must make a step first."""


class NotFiniteError(ValueError):
    """A prompt's keys, values or scores are NaN or infinite, so they cannot be ranked."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else "known are " + ", ".join(names) + "."
