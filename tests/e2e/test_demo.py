"""The README's demo does what the README says."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEMO = Path(__file__).parent.parent.parent / "scripts" / "demo.py"


def test_demo_answers_alike_and_frees_blocks():
    done = subprocess.run([sys.executable, str(DEMO)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    results = [line.split() for line in lines if "words right" in line]
    assert [int(words[0]) for words in results] == [128, 128]
    without, compressed = (int(words[5]) for words in results)
    assert compressed < 0.4 * without
    assert any("blocks went back to the pool" in line for line in lines)


def test_questions_over_one_context_share_its_compressed_prefix():
    script = DEMO.with_name("ask_one_context.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("|")[0].strip(): [float(cell) for cell in line.split("|")[1:]]
        for line in done.stdout.splitlines()
        if line.count("|") == 2 and "reuse" not in line
    }
    apart, together = rows["peak KV blocks held"]
    assert together < 0.5 * apart
    assert min(rows["right answers"]) >= 8
    assert "10 of 10 requests started from its compressed prefix" in done.stdout
