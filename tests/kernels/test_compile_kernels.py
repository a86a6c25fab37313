"""Every kernel compiles for the cards we name, and what it takes of them is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "compile_kernels.py"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("kernels") / "kernels.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(file.parent / "cache")}
    command = [sys.executable, str(SCRIPT), "--json", str(file)]
    subprocess.run(command, check=True, capture_output=True, env=environment)
    return json.loads(file.read_text())


@pytest.mark.slow
def test_every_kernel_compiles_for_every_card(rows):
    kernels = {
        "attend_runs", "join_runs", "copy_kept", "highest_weight", "lay_out",
        "fill_quantized", "read_quantized",
    }  # fmt: skip
    assert {(row["target"], row["kernel"]) for row in rows} == {
        (target, kernel) for target in (80, 90, 100) for kernel in kernels
    }
    for row in rows:
        assert 0 < row["registers"] <= 255, row
        assert row["shared"] <= 99 * 1024, row  # of a block on the smallest cards, sm_86 and sm_89


@pytest.mark.slow
def test_no_register_is_spilled(rows):
    assert [row for row in rows if row["local"]] == []
