"""How subcommands ask a running server about its contexts."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

PATH = "/v1/kvzip/contexts"
KEY_VARIABLE = "VLLM_API_KEY"
TIMEOUT_SECONDS = 600


class Refused(Exception):
    """What a server said, or why it said nothing."""


def add_server(parser: argparse.ArgumentParser) -> None:
    """Let a subcommand's user name a server."""
    parser.add_argument("--server", default="http://localhost:8000", help="its URL")
    parser.add_argument("--api-key", help=f"of the server; else the variable {KEY_VARIABLE}")


def call_server(
    args: argparse.Namespace, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """JSON of a server's answer.

    Args:
        args: with what :func:`add_server` adds.
        path: behind that of contexts.
        body: of a POST; None: it is a GET.

    Raises:
        Refused: in one sentence.
    """
    url = args.server.rstrip("/") + PATH + path
    headers = {"Content-Type": "application/json"}
    if key := args.api_key or os.environ.get(KEY_VARIABLE):
        headers["Authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            answer: dict[str, Any] = json.load(response)
            return answer
    except urllib.error.HTTPError as error:
        raise Refused(_sentence(error, url)) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Refused(f"{url} does not answer ({reason}).") from error


def _sentence(error: urllib.error.HTTPError, url: str) -> str:
    """What a server said; vLLM itself answers only "Not Found" where there is no such route."""
    try:
        told = json.load(error)["error"]
    except (ValueError, KeyError, TypeError):
        told = None
    message = told.get("message") if isinstance(told, dict) else told
    if error.code == 404 and str(message) in ("Not Found", "None"):
        return f"{url} is not there; start the server with VLLM_PLUGINS=kvzip."
    return str(message or error)
