"""The environment that ``compare_kvpress.py`` runs kvpress in, and what it runs there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kvzip.errors import ConfigError

TORCH_VERSION, KVPRESS_VERSION = "2.13.0", "0.5.5"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DEFAULT_VENV = Path(__file__).parents[2] / ".venv-kvpress"
METHODS = {  # name in kvpress_job.py -> what people call it
    "kvzip": "KVzip",
    "kvzip+": "KVzip+",
    "kvzip-per-layer": "KVzip per layer",
    "adakv-snapkv": "AdaKV + SnapKV",
    "expected-attention": "ExpectedAttention",
    "keydiff": "KeyDiff",
    "snapkv": "SnapKV",
    "streaming-llm": "StreamingLLM",
    "random": "random",
}


def kvpress_python(venv: Path) -> Path:
    """The interpreter of an environment that has kvpress; made when it does not exist.

    Raises:
        ConfigError: if it cannot be made.
    """
    python, stamp = venv.absolute() / "bin" / "python", venv / ".kvpress-ready"
    wanted = f"torch {TORCH_VERSION}, kvpress {KVPRESS_VERSION}\n"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    try:
        if python.exists() and (_text_of(stamp) == wanted or _has_kvpress(python)):
            return python
        if not python.exists() and venv.exists() and any(venv.iterdir()):
            raise FileExistsError(0, "it is a folder of something else")
        print(f"compare_kvpress: making {venv} with kvpress {KVPRESS_VERSION}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        (venv / ".gitignore").write_text("*\n", encoding="utf-8")
        # torch first and alone, as in setup.sh: kvpress would bring the CUDA build of it.
        torch = f"torch=={TORCH_VERSION}"
        if subprocess.run([*pip, f"{torch}+cpu"], stderr=subprocess.DEVNULL).returncode:
            subprocess.run([*pip, torch, "--index-url", TORCH_CPU_INDEX], check=True)
        subprocess.run([*pip, f"kvpress=={KVPRESS_VERSION}"], check=True)
        if not _has_kvpress(python):
            raise ImportError("kvpress does not load in it")
        stamp.write_text(wanted, encoding="utf-8")
    except (OSError, ImportError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise ConfigError(
            f"--venv {venv} cannot be made ({reason}); name an environment that has "
            f"kvpress {KVPRESS_VERSION}."
        ) from error
    return python


def _text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _has_kvpress(python: Path) -> bool:
    code = "import kvpress, sys; from importlib.metadata import version; "
    code += f"sys.exit(version('kvpress') != '{KVPRESS_VERSION}')"
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def run_kvpress(python: Path, work: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray | None]:
    """``kvpress_job.py``'s result, and KVzip's scores of the first document if it was asked for.

    Args:
        python: of an environment with kvpress.
        work: see ``kvpress_job.py``; without ``scores``.

    Returns:
        the result, and float32 ``[L, H, T]`` or None.

    Raises:
        ConfigError: if it fails; its own output comes before.
    """
    job = Path(__file__).with_name("kvpress_job.py")
    with tempfile.TemporaryDirectory() as folder:
        given, result, scores = (Path(folder) / n for n in ("work.json", "out.json", "scores.npy"))
        given.write_text(json.dumps({**work, "scores": str(scores)}), encoding="utf-8")
        command = [str(python), str(job), str(given), str(result)]
        if code := subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode:
            raise ConfigError(f"kvpress failed with exit code {code}; its output is above.")
        found = json.loads(result.read_text(encoding="utf-8"))
        return found, np.load(scores) if scores.exists() else None
