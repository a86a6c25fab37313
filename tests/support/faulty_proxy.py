"""An HTTP proxy in front of a real server that fails as servers fail, when it is told to."""

from __future__ import annotations

import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DROP = "drop"  # closes the connection without an answer


class FaultyProxy:
    """Hands requests on to a server; use it in a ``with`` statement.

    Args:
        target: URL of the server.

    Attributes:
        url: of the proxy.
        target: URL of the server; may change.
        faults: taken one by one by the requests of ``path``: an HTTP status, ``DROP``, or seconds
            to wait as a float before the request is handed on.
        path: end of the paths that fail.
        seen: paths of all requests.
    """

    def __init__(self, target: str) -> None:
        self.target = target
        self.faults: list[int | float | str] = []
        self.path = "/chat/completions"
        self.seen: list[str] = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                self._answer(self.rfile.read(int(self.headers["Content-Length"])))

            def log_message(self, *args: Any) -> None:
                pass

            def _answer(self, body: bytes | None) -> None:
                proxy.seen.append(self.path)
                fault = None
                if self.path.endswith(proxy.path) and proxy.faults:
                    fault = proxy.faults.pop(0)
                if fault == DROP:
                    self.close_connection = True
                    return
                if isinstance(fault, float):
                    time.sleep(fault)
                if isinstance(fault, int):
                    self._send(fault, b'{"error": {"message": "busy"}}', {"Retry-After": "0.1"})
                    return
                headers = {"Content-Type": "application/json"}
                request = urllib.request.Request(proxy.target + self.path, body, headers)
                try:
                    with urllib.request.urlopen(request, timeout=120) as answer:
                        self._send(answer.status, answer.read(), dict(answer.headers))
                except urllib.error.HTTPError as error:
                    self._send(error.code, error.read(), dict(error.headers))

            def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                try:
                    self.send_response(status)
                    kept = {k: v for k, v in headers.items() if k.lower() in _KEPT}
                    for name, value in kept.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(body)))
                    self.end_headers()
                    self.wfile.write(body)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True  # the client has gone

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


_KEPT = ("content-type", "retry-after")
