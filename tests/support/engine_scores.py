"""Scores that a real engine gives contexts; the other side is ``scoring_job.py``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from engine_job import MODEL
from forked_script import ENGINES, run_script

SCRIPT = Path(__file__).with_name("scoring_job.py")


def engine_scores(
    folder: Path,
    prompts: list[list[int]],
    kvzip: dict[str, Any],
    options: list[dict[str, Any]] | None = None,
    before: list[list[int]] | None = None,
    **engine: Any,
) -> tuple[dict[int, Any], list[int]]:
    """Scores ``[L, H, T]`` by the prefix's seed as a fresh engine computes them.

    Also how many segments each repeating pass had. ``folder`` takes files of the job, ``options``
    are those of each prompt, and prompts of ``before`` are read and not compressed.
    """
    arguments = {
        "model": str(MODEL), "dtype": "float32", "enforce_eager": True, "block_size": 32,
        "gpu_memory_utilization": 0.3, "additional_config": {"kvzip": kvzip}, **engine,
    }  # fmt: skip
    job, answer = folder / "job.json", folder / "answer.pt"
    first = before or []
    lists = {
        "before": (first, [{"kvzip": "off"} for _ in first]),
        "prompts": (prompts, options or [{} for _ in prompts]),
    }
    job.write_text(json.dumps({"engine": arguments, **lists}))
    done = run_script(
        SCRIPT,
        str(job),
        str(answer),
        environment={**ENGINES, "TMPDIR": str(folder)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(answer)
    return found["scores"], found["passes"]
