"""vLLM versions: the tested ones, and what differs. A new release touches this file."""

from __future__ import annotations

import vllm

TESTED_VERSIONS = ("0.32.0",)


def running_version() -> str:
    """Version of the imported vLLM without a local part such as ``+cpu``."""
    return str(vllm.__version__).split("+")[0]


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
