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
    """All targets at once: each is compiled on one core."""
    folder = tmp_path_factory.mktemp("kernels")
    running = []
    for target in ("80", "90", "100"):
        environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / f"cache-{target}")}
        command = [sys.executable, str(SCRIPT), "--targets", target]
        command += ["--json", str(folder / f"{target}.json")]
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    assert [process.wait() for process in running] == [0, 0, 0]
    return [row for path in folder.glob("*.json") for row in json.loads(path.read_text())]


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


@pytest.mark.slow
def test_layers_share_a_kernel_wherever_their_scales_lie():
    """Those of two heads are 24 bytes apart: aligned in every other layer."""
    program = """
import compile_kernels as script, torch
from gpu.kernel_cases import Asked, Shape, make_case
case = make_case(
    [Asked(340, 1, 16, 0.5)], Shape(2, 2, 4, 64), dtype=torch.bfloat16, eight_bits="queries too"
)
found = set()
with script.compiling(90) as compiled:
    for layer in range(2):
        script.attend(case, layer, num_runs=4)
        found.add(compiled["attend_runs"].hash)
print(len(found))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPT.parent, check=True, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout.split() == ["1"]
