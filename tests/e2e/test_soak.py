"""A short soak: the script that puts a random load on an engine and checks it after every step."""

from pathlib import Path

import pytest
from forked_script import ENGINES, run_script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "soak.py"


@pytest.mark.parametrize(
    "flags",
    [(), ("--prefill-budget", "192"), ("--mode", "mixed")],
    ids=["", "prefill budget", "mixed"],
)
def test_everything_adds_up_after_every_step(flags):
    arguments = ("--requests", "200", "--seed", "3", *flags)
    done = run_script(SCRIPT, *arguments, environment=ENGINES, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "200 requests" in done.stdout
    assert "all adds up" in done.stdout
