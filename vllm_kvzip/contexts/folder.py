"""The folder of context files that an operator names: plain names, a limit, a time to live.

A file gets its name only when it is whole and on the disk, so a crash or a full disk leaves the
other files, and the older file of the same name, as they were. The time of a file's last change is
the time of its last use. Several servers may share a folder.
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from vllm_kvzip.contexts.context_file import (
    Summary,
    read_context,
    read_summary,
    write_context,
)
from vllm_kvzip.errors import ConfigError, ContextFileError, NoContextFileError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm_kvzip.contexts.context_file import StoredContext

SUFFIX = ".safetensors"
_PART = ".part"
STALE_SECONDS = 3600  # after which the part of a file that nobody finished is removed
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder.

    Attributes:
        name: without suffix.
        num_bytes: its size.
        last_used: seconds since 1970.
    """

    name: str
    num_bytes: int
    last_used: float


class ContextFolder:
    """Files of compressed contexts.

    Args:
        path: the folder; made when the first file is written.
        max_bytes: of all files; least recently used ones go first. None: no limit.
        ttl_seconds: a file that nobody used for so long goes. None: it stays.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int | None = None,
        ttl_seconds: float | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self._ttl = ttl_seconds
        self._clock = clock

    def save(self, name: str, context: StoredContext) -> FileEntry:
        """Write a context; one of the same name is replaced. Then files over the limit go.

        Args:
            name: plain, see :func:`file_name`.
            context: what to write.

        Raises:
            ContextFileError: if the name is none, the context is larger than the limit, or it
                cannot be written. The folder is as it was then.
        """
        target = self.path / file_name(name)
        if self.max_bytes is not None and context.num_bytes > self.max_bytes:
            raise ContextFileError(
                f"The context has {context.num_bytes} bytes, more than contexts_bytes, which is "
                f"{self.max_bytes}."
            )
        part = self.path / f".{target.name}.{os.getpid()}.{time.monotonic_ns()}{_PART}"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._remove_stale_parts()
            write_context(part, context)
            _to_disk(part)
            os.utime(part, times=(self._clock(),) * 2)
            os.replace(part, target)
            _to_disk(self.path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise ContextFileError(
                f"{target.name} could not be written to contexts_dir ({reason}); all other files "
                f"are as they were."
            ) from error
        self._remove_oldest(keep=target)
        try:
            return _entry(target)
        except OSError as error:
            raise ContextFileError(
                f"{target.name} was written, and is gone again ({error.strerror})."
            ) from error

    def load(self, name: str) -> tuple[FileEntry, StoredContext]:
        """Read a context and check every byte of it; counts as a use of the file.

        Args:
            name: plain, see :func:`file_name`.

        Raises:
            NoContextFileError: if there is no such file, or its time is over.
            ContextFileError: if the name is none, or the file cannot be used; one sentence.
        """
        path = self.path / file_name(name)
        self._remove_expired()
        if path.is_symlink() or not path.is_file():
            raise NoContextFileError(
                f"There is no context file {path.name} in this server's contexts_dir."
            )
        try:
            entry, context = _entry(path), read_context(path)
        except OSError as error:
            raise ContextFileError(f"{path.name} could not be read ({error.strerror}).") from error
        with suppress(OSError):  # a folder that this server may only read
            os.utime(path, times=(self._clock(),) * 2)
        return entry, context

    def entries(self) -> list[FileEntry]:
        """All files whose time is not over, least recently used first."""
        self._remove_expired()
        return self._entries()

    def summary(self, entry: FileEntry) -> Summary | None:
        """What the head of a file says; None where it is gone or no context file."""
        try:
            return read_summary(self.path / file_name(entry.name))
        except (ContextFileError, OSError):
            return None

    def _entries(self) -> list[FileEntry]:
        found = []
        for path in self.path.glob(f"*{SUFFIX}"):
            if _is_plain(path.stem) and not path.is_symlink():
                with suppress(OSError):  # another server has just removed it
                    found.append(_entry(path))
        return sorted(found, key=lambda entry: (entry.last_used, entry.name))

    def _remove_expired(self) -> None:
        if self._ttl is None:
            return
        oldest = self._clock() - self._ttl
        for entry in self._entries():
            if entry.last_used <= oldest and self._is_ours(entry):
                self._remove(entry)

    def _remove_oldest(self, keep: Path) -> None:
        self._remove_expired()
        if self.max_bytes is None:
            return
        entries = list(filter(self._is_ours, self._entries()))
        total = sum(entry.num_bytes for entry in entries)
        for entry in entries:
            if total <= self.max_bytes:
                return
            if entry.name != keep.stem:
                self._remove(entry)
                total -= entry.num_bytes

    def _remove_stale_parts(self) -> None:
        """Parts of a process that ended while it wrote."""
        for part in self.path.glob(f".*{SUFFIX}.*{_PART}"):
            with suppress(OSError):
                if time.time() - part.stat().st_ctime > STALE_SECONDS:
                    part.unlink()

    def _is_ours(self, entry: FileEntry) -> bool:
        """Whether a file is a context file; a model's weights may lie in the folder too."""
        return self.summary(entry) is not None

    def _remove(self, entry: FileEntry) -> None:
        with suppress(OSError):
            (self.path / file_name(entry.name)).unlink(missing_ok=True)


def file_name(name: str) -> str:
    """The file of a plain name, of letters, digits and ``._-``; its suffix may be left out.

    Raises:
        ContextFileError: if the name is anything else, such as a path.
    """
    plain = name.removesuffix(SUFFIX)
    if not _is_plain(plain):
        raise ContextFileError(
            f"{name[:120]!r} is no name of a context file: up to 100 letters, digits and . _ - "
            f"that begin with a letter or digit."
        )
    return plain + SUFFIX


def _is_plain(name: str) -> bool:
    """Whether a name without its suffix is one that leads back to its file."""
    return _NAME.fullmatch(name) is not None and not name.endswith(SUFFIX)


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or read, when the server starts.

    Raises:
        ConfigError: in one sentence.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        next(path.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"contexts_dir={str(path)!r} is no folder that can be used ({error.strerror}); name "
            f"another one."
        ) from error


def _entry(path: Path) -> FileEntry:
    status = path.stat()
    return FileEntry(path.stem, status.st_size, status.st_mtime)


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
