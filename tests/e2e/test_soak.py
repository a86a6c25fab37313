"""A short soak: the script that puts a random load on an engine and checks it after every step."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "soak.py"


@pytest.mark.parametrize(
    "flags",
    [(), ("--prefill-budget", "192"), ("--mode", "mixed")],
    ids=["", "prefill budget", "mixed"],
)
def test_everything_adds_up_after_every_step(flags):
    command = [sys.executable, SCRIPT, "--requests", "200", "--seed", "3", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "200 requests" in done.stdout
    assert "all adds up" in done.stdout
