"""vLLM versions: the tested ones, and what differs. A new release touches this file."""

from __future__ import annotations

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge import symbols

TESTED_VERSIONS = ("0.31.0", "0.32.0")
PARTLY_TESTED_VERSIONS = ("0.33.0",)
"""With these start-up and settings were tested, on vLLM's Python files; no engine was."""
OLDEST_VERSION = (0, 31)
_NO_CASCADE_SINCE = (0, 32)


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
    if symbols.is_before(OLDEST_VERSION):
        oldest = ".".join(map(str, OLDEST_VERSION))
        raise UnsupportedError(
            f"KV compression needs vLLM {oldest} or newer, but {version} is running; upgrade vLLM."
        )
    try:
        from vllm_kvzip.vllm_bridge.platforms import running_platform

        needed = [symbols.COMMON, running_platform().symbols]
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
    partly = version in PARTLY_TESTED_VERSIONS
    return (
        f"KV compression was tested with vLLM {' and '.join(TESTED_VERSIONS)}, but {version} is "
        f"running{', with which no engine was tested' if partly else ''}: compare a few outputs at "
        f"keep_ratio 1.0 with stock vLLM before relying on it."
    )


def has_cascade_attention() -> bool:
    """Whether vLLM can compute a prefix that a batch shares once, with kernels that we do not wrap.

    It takes the same first blocks in all block tables for the same first tokens.
    """
    return symbols.is_before(_NO_CASCADE_SINCE)
