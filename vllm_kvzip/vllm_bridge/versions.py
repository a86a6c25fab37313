"""vLLM versions: the tested ones, and what differs. A new release touches this file."""

from __future__ import annotations

import re

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge import symbols
from vllm_kvzip.vllm_bridge.platforms import running_platform

TESTED_VERSIONS = ("0.32.0",)
OLDEST_VERSION = (0, 32)


def running_version() -> str:
    """Version of the imported vLLM without a local part such as ``+cpu``."""
    return str(symbols.vllm_version).split("+")[0]


def check_version(serves: bool) -> None:
    """Refuse a vLLM that lacks what the bridge is built on.

    Args:
        serves: whether HTTP routes are among that.

    Raises:
        UnsupportedError: if it is too old, or a name that the bridge uses is gone.
    """
    version = running_version()
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < OLDEST_VERSION:
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise UnsupportedError(
            f"KV compression needs vLLM {oldest} or newer, but {version} is running; upgrade vLLM."
        )
    needed = [symbols.COMMON, running_platform().symbols]
    try:
        symbols.check_symbols(*needed, *([symbols.SERVER] if serves else []))
    except ImportError as error:
        raise UnsupportedError(
            f"KV compression does not fit vLLM {version} ({error}); install a tested version: "
            f"{', '.join(TESTED_VERSIONS)}."
        ) from error


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
