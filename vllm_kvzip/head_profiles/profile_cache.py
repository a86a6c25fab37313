"""Profiles that engines made for themselves, in a folder of the user.

A file is for one model: its name holds a digest of the model's configuration and weight files, so
that two fine-tunes of one shape are told apart. The networks are written first, each file under
another name before it gets its own; a reader therefore never sees half a profile.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.head_profiles.head_profile import check_matches, load_profile, save_profile
from vllm_kvzip.head_profiles.networks import SCHEMA_VERSION, load_surrogate, save_surrogate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm_kvzip.head_profiles.head_profile import HeadProfile, ModelFingerprint
    from vllm_kvzip.head_profiles.networks import LayerSurrogate

NETWORKS_SUFFIX = ".safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
POLL_SECONDS = 0.2


def weight_files(model: str) -> list[tuple[str, int, int]]:
    """Name, bytes and time of the last change of each weight file of a local model.

    Args:
        model: a folder, a file, or a name that is neither; nothing is found then.
    """
    path = Path(model)
    found = [path] if path.is_file() else sorted(path.glob("*")) if path.is_dir() else []
    return [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in found
        if file.suffix in WEIGHT_SUFFIXES
    ]


def cache_file(folder: Path, model: ModelFingerprint, details: dict[str, Any]) -> Path:
    """Where the profile of a model lies, or will.

    Args:
        folder: of all profiles.
        model: its shape and name.
        details: plain values that tell it from others of this shape.
    """
    whole = {"model": model.model_dump(), "networks": SCHEMA_VERSION, **details}
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]
    name = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in model.name)
    return folder / f"{name or 'model'}-{digest}.json"


def is_usable(path: Path, model: ModelFingerprint) -> bool:
    """Whether a whole profile of a model, with its networks, lies there."""
    try:
        check_matches(load_profile(path), model, path)
        load_surrogate(path.with_suffix(NETWORKS_SUFFIX), model)
    except ProfileError:
        return False
    return True


def store(path: Path, profile: HeadProfile, layers: list[LayerSurrogate]) -> None:
    """Write a profile and its networks.

    Raises:
        OSError: if the folder cannot be written.
    """
    networks = path.with_suffix(NETWORKS_SUFFIX)
    part = networks.with_name(networks.name + ".part")
    notes = {
        "texts": ", ".join(profile.provenance.texts),
        "created": profile.provenance.created,
    }
    save_surrogate(part, layers, profile.model, notes)
    part.replace(networks)
    part = path.with_name(path.name + ".part")
    save_profile(profile, part)
    part.replace(path)


@contextmanager
def build_lock(path: Path, deadline: float) -> Iterator[None]:
    """Keep other processes from building the same profile; wait while one of them does.

    Args:
        path: of the profile.
        deadline: of :func:`time.monotonic`, until when to wait.

    Raises:
        TimeoutError: if another process builds for longer than that.
        OSError: if the folder cannot be written, or has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError("another process is still building it") from None
                time.sleep(POLL_SECONDS)
        yield  # the lock ends with the open file
