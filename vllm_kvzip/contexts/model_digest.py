"""Digests that tell one model from another on any machine, without reading all of its weights."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
SAMPLES, SAMPLE_BYTES = 64, 4096


def weights_digest(model: Path) -> str | None:
    """Digest of a checkpoint: sizes of its weight files, and samples of their bytes.

    Fine-tunes of one model differ nearly everywhere, so that samples tell them apart.

    Args:
        model: a folder, or one file.

    Returns:
        hexadecimal; None where no weights are found.
    """
    files = [model] if model.is_file() else sorted(model.glob("*")) if model.is_dir() else []
    found = hashlib.sha256()
    weights = [file for file in files if file.suffix in WEIGHTS]
    for path in weights:
        size = path.stat().st_size
        found.update(f"{size} ".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(max(0, size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                found.update(file.read(SAMPLE_BYTES))
    return found.hexdigest()[:16] if weights else None


def tokenizer_digest(folder: Path) -> str | None:
    """Digest of what a tokenizer's folder says of tokens; None where nothing is found.

    A chat template is no part of it: it decides which tokens a prompt has, and these are compared.
    """
    found = hashlib.sha256()
    files = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    for path in files:
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:16] if files else None
