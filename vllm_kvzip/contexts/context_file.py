"""One compressed context as a safetensors file: its tokens, its head table, its pages.

The tokens are there and no hash of them: vLLM's block hashes differ between servers
(``PYTHONHASHSEED``, ``--prefix-caching-hash-algo``), so whoever reads the file hashes anew. KV
pairs as they are lie row by row, ``[tokens, dimensions]``, whatever order the kernel of a machine
wants. Quantized pages lie byte by byte, as CPUs and GPUs write them alike. A SHA-256 covers all of
it, and nothing of a file is used before it has been checked.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_kvzip.core import PrefixPlan
from vllm_kvzip.errors import ContextFileError
from vllm_kvzip.planning.prefix_seed import checksum, prefix_seed

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT = "vllm-kvzip context"
VERSION = "1"
TOKENS = "token_ids"
_DIGEST = "sha256"
_PLAN = TypeAdapter(PrefixPlan)
_IDENTITY = TypeAdapter(dict[str, str])


@dataclass(frozen=True)
class StoredContext:
    """A compressed context outside of any engine.

    Attributes:
        token_ids: the tokens before the boundary.
        plan: its boundary, keep ratio and block counts.
        identity: what an engine must have in common with the one that wrote it.
        tensors: on the CPU; names and shapes are those of ``worker/context_pages.py``.
    """

    token_ids: list[int]
    plan: PrefixPlan
    identity: dict[str, str]
    tensors: dict[str, torch.Tensor]

    @property
    def seed(self) -> int:
        """Equal for equal tokens."""
        return prefix_seed(self.token_ids, len(self.token_ids))

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return 4 * len(self.token_ids) + sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class Summary:
    """What the head of a file says, which nobody has checked.

    Attributes:
        id: by which the contexts endpoint lists it.
        plan: its boundary, keep ratio and block counts.
    """

    id: str
    plan: PrefixPlan


def write_context(path: Path, context: StoredContext) -> None:
    """Write a file; it is whole only when the call returns.

    Raises:
        OSError, SafetensorError: if it cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in context.tensors.items()}
    tensors[TOKENS] = torch.tensor(context.token_ids, dtype=torch.int32)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "id": checksum(context.seed),
        "plan": json.dumps(asdict(context.plan)),
        "identity": json.dumps(context.identity),
    }
    save_file(tensors, path, {**metadata, _DIGEST: _digest(metadata, tensors)})


def read_context(path: Path) -> StoredContext:
    """Read a whole file into memory and check every byte of it.

    Raises:
        ContextFileError: if it is torn, changed, or of another format; one sentence.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_format(path, metadata)
            # Copies: the file is mapped, and what has been checked must be what is used.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _torn(path) from error
    digest = metadata.pop(_DIGEST, None)
    if digest != _digest(metadata, tensors):
        raise ContextFileError(
            f"{path.name} has changed since it was written (its checksum is another one); export "
            f"it again."
        )
    tokens = tensors.pop(TOKENS, None)
    plan = _plan_of(path, metadata)
    if tokens is None or tokens.dtype != torch.int32 or tokens.shape != (plan.boundary_tokens,):
        raise ContextFileError(f"{path.name} does not hold the tokens that it names.")
    identity = _IDENTITY.validate_json(metadata["identity"])
    return StoredContext(tokens.tolist(), plan, identity, tensors)


def read_summary(path: Path) -> Summary:
    """Read the head of a file only.

    Raises:
        ContextFileError: if it has none of ours; one sentence.
        OSError: if it cannot be read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise _torn(path) from error
    _check_format(path, metadata)
    return Summary(metadata.get("id", ""), _plan_of(path, metadata))


def check_identity(name: str, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Refuse a file of an engine that differs in anything that shapes a compressed context.

    Args:
        name: of the file.
        theirs: identity of the engine that wrote it.
        ours: of the engine that reads it.

    Raises:
        ContextFileError: names the first thing that differs, and both values.
    """
    for what in (*ours, *(theirs.keys() - ours.keys())):
        there, here = theirs.get(what, "none"), ours.get(what, "none")
        if there != here:
            raise ContextFileError(
                f"{name} does not fit this server: {what} is {here} here and was {there} where the "
                f"file was written."
            )


def _check_format(path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ContextFileError(f"{path.name} is no file of a compressed context.")
    if metadata.get("version") != VERSION:
        raise ContextFileError(
            f"{path.name} has version {metadata.get('version')} of the format, and this server "
            f"reads version {VERSION}."
        )


def _plan_of(path: Path, metadata: Mapping[str, str]) -> PrefixPlan:
    try:
        return _PLAN.validate_json(metadata.get("plan", ""))
    except ValidationError as error:
        raise ContextFileError(
            f"{path.name} says of its context what this version of the plugin does not understand."
        ) from error


def _torn(path: Path) -> ContextFileError:
    return ContextFileError(
        f"{path.name} is torn, or no safetensors file at all; nothing of it was used."
    )


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over metadata and tensors, their names, dtypes and shapes included."""
    found = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        if tensor.numel():
            found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
