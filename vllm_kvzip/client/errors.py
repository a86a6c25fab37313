"""What a user of the client can meet; each message is one sentence."""

from __future__ import annotations

from vllm_kvzip.errors import KVzipError


class ClientError(KVzipError):
    """Base of the errors below."""


class DocumentError(ClientError):
    """A file cannot be read as a document, or is too long for the reader's limits."""


class QuestionError(ClientError):
    """A question cannot be asked: it is empty, or longer than the room beside a part."""


class BudgetError(ClientError):
    """A question needs more calls than its budget allows."""


class ServerError(ClientError):
    """The server refused, or did not answer within the retries.

    Args:
        message: one sentence.
        status: of HTTP; None where no answer came.
        kind: ``type`` of the server's error; empty where it has none.
    """

    def __init__(self, message: str, status: int | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
