"""vLLM versions: the tested ones, and what differs. A new release touches this file."""

from __future__ import annotations

import re

import vllm

from vllm_kvzip.errors import UnsupportedError

TESTED_VERSIONS = ("0.32.0",)
OLDEST_VERSION = (0, 32)


def running_version() -> str:
    """Version of the imported vLLM without a local part such as ``+cpu``."""
    return str(vllm.__version__).split("+")[0]


def check_version() -> None:
    """Refuse a vLLM that lacks what the bridge is built on.

    Raises:
        UnsupportedError: if it is too old.
    """
    version = running_version()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise UnsupportedError(
            f"KV compression needs vLLM {oldest} or newer, but {version} is running; upgrade vLLM."
        )


def misfit(error: ImportError) -> UnsupportedError:
    """The sentence for a name that the bridge imports and the running vLLM lacks."""
    return UnsupportedError(
        f"KV compression does not fit vLLM {running_version()} ({error}); install a tested "
        f"version: {', '.join(TESTED_VERSIONS)}."
    )


def untested_warning() -> str | None:
    """One sentence when the running vLLM is not among the tested ones, else None."""
    version = running_version()
    if version in TESTED_VERSIONS:
        return None
    tested = ", ".join(TESTED_VERSIONS)
    return (
        f"KV compression was tested with vLLM {tested}, but {version} is running: compare a few "
        f"outputs at keep_ratio 1.0 with stock vLLM before relying on it."
    )
