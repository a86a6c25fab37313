"""Run a script that imports vLLM, without the time that the import takes.

Importing torch and vLLM takes two thirds of the life of a small engine's process. Here one process
per environment imports them once, and forks a child for each script that is to run. A child has
what a new process has after these imports: no engine was ever made in its parent, which has a
single thread. Nothing of this plugin is imported before the fork.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.cpu_worker",
)


ENGINES = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
"""Environment of scripts that step their engine by hand."""


def run_script(
    script: Path, *arguments: str, environment: Mapping[str, str], timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """Run a Python script to its end, as ``subprocess.run`` would.

    Args:
        script: file of the script; what it imports may lie beside it.
        arguments: of the command line.
        environment: all variables that it sees.
        timeout: seconds after which it is ended by SIGALRM.

    Returns:
        its exit code, negative where a signal ended it, and what it wrote.
    """
    shared = {name: environment[name] for name in environment if name not in OF_ONE_SCRIPT}
    parent = _parent(tuple(sorted(shared.items())))
    with (
        tempfile.NamedTemporaryFile(mode="r", errors="replace") as output,
        tempfile.NamedTemporaryFile(mode="r", errors="replace") as errors,
    ):
        job = {
            "argv": [str(script), *arguments],
            "environment": dict(environment),
            "output": output.name,
            "errors": errors.name,
            "timeout": timeout,
        }
        assert parent.stdin is not None
        assert parent.stdout is not None
        print(json.dumps(job), file=parent.stdin, flush=True)
        code = int(parent.stdout.readline())
        return subprocess.CompletedProcess(job["argv"], code, output.read(), errors.read())


OF_ONE_SCRIPT = {"PYTEST_CURRENT_TEST", "TMPDIR"}
"""Variables that are read after the imports only."""


@functools.cache
def _parent(environment: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """A process with these variables that forks; it ends when its standard input does."""
    parent = subprocess.Popen(
        [sys.executable, __file__],
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    atexit.register(parent.communicate)
    return parent


def serve() -> None:
    """The other side: import, then fork a child for each line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    for module in IMPORTED:
        __import__(module)
    gc.freeze()  # children need not look through what was imported
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            answers.close()
            become(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def become(job: dict) -> None:
    """Be the process of the script; does not return."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(job["output"], os.O_WRONLY), 1)
    os.dup2(os.open(job["errors"], os.O_WRONLY), 2)
    os.environ.clear()
    os.environ.update(job["environment"])
    tempfile.tempdir = None  # may have been looked up already
    signal.alarm(job["timeout"])
    sys.argv = job["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
    raise SystemExit


if __name__ == "__main__":
    serve()
