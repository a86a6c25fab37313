"""Benchmarks whose variants take turns, each in an engine and a process of its own.

A script calls itself with ``--job``: machines are noisy, so variants are compared within rounds,
and one engine must not find another one's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

if TYPE_CHECKING:
    from collections.abc import Callable

Key = TypeVar("Key")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``--rounds``, and the hidden flag by which the script calls itself."""
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)


def answer_job(job: str, run_once: Callable[[dict[str, Any]], Any]) -> None:
    """Do the work of one turn, write its answer, and end the process."""
    values = json.loads(job)
    Path(values["answer"]).write_text(json.dumps(run_once(values)))
    sys.stdout.flush()
    os._exit(0)  # vLLM's own shutdown costs seconds


def take_turns(
    script: str, jobs: dict[Key, dict[str, Any]], rounds: int, folder: Path, **environment: str
) -> dict[Key, list[Any]]:
    """What each job answered, round by round.

    Args:
        script: path of the calling script.
        jobs: what ``run_once`` gets, by any key.
        rounds: how often all of them run.
        folder: takes the answers.
        environment: more environment variables.

    Raises:
        subprocess.CalledProcessError: when an engine fails; it holds what the engine said.
    """
    answers: dict[Key, list[Any]] = {key: [] for key in jobs}
    for key, job in tqdm([*jobs.items()] * rounds, desc="engines"):
        answers[key].append(take_turn(script, job, folder / "answer.json", None, **environment))
    return answers


def take_turn(
    script: str, job: dict[str, Any], answer: Path, timeout: float | None = None, **environment: str
) -> Any:
    """What one job answered.

    Args:
        script: path of the calling script.
        job: what ``run_once`` gets.
        answer: takes the answer.
        timeout: seconds after which the engine is ended.
        environment: more environment variables.

    Raises:
        subprocess.CalledProcessError: when the engine fails; it holds what the engine said.
        subprocess.TimeoutExpired: when it takes longer.
    """
    variables = {**CPU_ENVIRONMENT, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    command = [sys.executable, script, "--job", json.dumps({**job, "answer": str(answer)})]
    subprocess.run(
        command, check=True, env={**variables, **environment}, capture_output=True, timeout=timeout
    )
    return json.loads(answer.read_text())
