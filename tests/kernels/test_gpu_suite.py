"""What a machine with a card would run, run here with tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SUITE = ["bash", str(ROOT / "scripts" / "gpu_suite.sh")]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    done = subprocess.run(
        [
            "bash",
            str(ROOT / "scripts" / "gpu_suite.sh"),
            "--interpret",
            "--output-dir",
            str(folder),
        ],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout, *(
        json.loads((folder / f"{name}.json").read_text())
        for name in ("gpu_checks", "gpu_times", "gpu_engines")
    )


@pytest.mark.slow
def test_the_dry_run_checks_every_kernel(suite):
    _, found, times, _ = suite
    names = {check["name"].split()[0] for check in found["checks"]}
    assert names == {"attention", "compaction", "quantization", "scores", "tables"}
    assert all(check["error"] <= check["limit"] for check in found["checks"])
    assert {row["keep"] for row in times["decode"]} == {1.0, 0.5, 0.25, 0.125}


@pytest.mark.slow
@pytest.mark.vllm
def test_the_dry_run_asks_engines(suite):
    text, _, _, found = suite
    engines = found["engines"]
    assert found["faults"] == []
    assert engines["float32, keep 0.25"]["freed"] > 0
    assert engines["float32, keep 1.0, kernel auto"]["compressed"] == 3
    assert "| float32, keep 1.0, kernel auto | 100.0% |" in text


@pytest.mark.slow
def test_it_says_that_its_times_mean_nothing(suite):
    text, found, _, _ = suite
    assert "times mean nothing" in text
    assert f"{len(found['checks'])} of {len(found['checks'])} checks passed" in text


def test_without_a_card_it_says_so():
    done = subprocess.run(
        SUITE,
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--interpret" in done.stdout
