"""Start `vllm serve` for a script or a test, talk to it, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from types import TracebackType

START_SECONDS = 420  # several engines on two busy cores take minutes
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class RunningServer:
    """What one can ask of a vLLM server.

    Args:
        url: such as ``http://localhost:8000``.
        model: its model's name.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url = url.rstrip("/")
        self.model = model

    def get(self, path: str) -> str:
        """Body of a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            answer: str = response.read().decode()
            return answer

    def metrics(self) -> dict[str, float]:
        """The server's `/metrics`: sample name with labels -> value."""
        lines = (line for line in self.get("/metrics").splitlines() if line and line[0] != "#")
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def blocks_held(self, samples: dict[str, float] | None = None) -> float:
        """KV cache blocks in use, from vLLM's own metrics, now or when ``samples`` were taken."""
        samples = samples or self.metrics()
        usage = next(v for k, v in samples.items() if k.startswith("vllm:kv_cache_usage_perc"))
        info = next(k for k in samples if k.startswith("vllm:cache_config_info"))
        total = int(info.split('num_gpu_blocks="')[1].split('"')[0])
        return usage * (total - 1)  # one block is vLLM's null block

    def stream(self, prompt: list[int] | str, max_tokens: int, **options: Any) -> Generator[str]:
        """Pieces of a greedy completion as they arrive."""
        body = {**_completion(prompt, max_tokens), **options}
        for choice in self._choices("/v1/completions", body, timeout=120):
            yield choice["text"]

    def stream_chat(self, message: str, max_tokens: int, **options: Any) -> Generator[str]:
        """Pieces of a greedy answer to one user's message as they arrive."""
        body = {
            "messages": [{"role": "user", "content": message}],
            "max_tokens": max_tokens,
            "temperature": 0,
            **options,
        }
        for choice in self._choices("/v1/chat/completions", body, timeout=300):
            yield choice["delta"].get("content") or ""

    def complete(self, prompt: list[int] | str, max_tokens: int, **options: Any) -> dict[str, Any]:
        """The whole answer of a greedy completion."""
        body = {**_completion(prompt, max_tokens), **options}
        answer: dict[str, Any] = json.loads(self.post("/v1/completions", **body))
        return answer

    def post(self, path: str, **body: Any) -> str:
        """What a route answers; ``urllib.error.HTTPError`` where it refuses."""
        with urllib.request.urlopen(self._request(path, body), timeout=120) as response:
            answer: str = response.read().decode()
            return answer

    def _choices(self, path: str, body: dict[str, Any], timeout: int) -> Iterator[dict[str, Any]]:
        """The first choice of each event of a streamed answer."""
        request = self._request(path, {**body, "stream": True})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            for raw in response:
                line = raw.decode().strip()
                if line.startswith("data: ") and line != "data: [DONE]":
                    yield json.loads(line[6:])["choices"][0]

    def _request(self, path: str, body: dict[str, Any]) -> urllib.request.Request:
        return urllib.request.Request(
            self.url + path,
            json.dumps({"model": self.model, **body}).encode(),
            {"Content-Type": "application/json"},
        )


def _completion(prompt: list[int] | str, max_tokens: int) -> dict[str, Any]:
    """Body of a greedy completion of just so many tokens."""
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}


class LocalServer(RunningServer):
    """A `vllm serve` process on a free port; use it in a `with` statement.

    Args:
        model: folder of the model.
        arguments: more arguments of `vllm serve`.
        environment: variables on top of the current ones.
    """

    def __init__(
        self, model: str, *arguments: str, environment: dict[str, str] | None = None
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{self.port}", model)
        command = [
            str(Path(sys.executable).with_name("vllm")), "serve", model,
            "--host", "127.0.0.1", "--port", str(self.port),
            "--dtype", "float32", "--enforce-eager", "--gpu-memory-utilization", "0.3", *arguments,
        ]  # fmt: skip
        self._log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            env={**CPU_ENVIRONMENT, **os.environ, **(environment or {})},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> LocalServer:
        """Wait until the server answers.

        Raises:
            RuntimeError: if it stops or does not answer in time; ends with its last lines.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(self.url + "/health", timeout=2):
                    return self
            except OSError:
                time.sleep(0.5)
        text = self.log()
        self.stop()
        raise RuntimeError(f"vllm serve did not start:\n{text[-3000:]}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and every process it started, and drop its log."""
        for sent in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                os.killpg(self._process.pid, sent)
                try:
                    self._process.wait(20)
                except subprocess.TimeoutExpired:
                    continue
        self._log.close()

    def log(self) -> str:
        """What the server has printed so far."""
        return Path(self._log.name).read_text(encoding="utf-8", errors="replace")
