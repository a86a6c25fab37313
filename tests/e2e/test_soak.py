"""A short soak: the script that puts a random load on an engine and checks it after every step."""

from pathlib import Path

import pytest
from forked_script import ENGINES, run_script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "soak.py"
PRIORITY = ("--scheduling-policy", "priority")
WINDOWED, CONVOLVED = (
    str(SCRIPT.parent.parent / "tests" / "models" / name)
    for name in ("tiny-windowed", "tiny-convolved")
)
RIGHT_NORMS = '{"compilation_config": {"custom_ops": ["none"]}}'  # docs/limits.md, LFM2 on CPUs
SHORT_STEPS = ("--max-num-batched-tokens", "128")
RUNS = {  # requests, seed, flags
    "evict": (120, 3),
    "prefill budget": (220, 8, "--prefill-budget", "192", "--pool-blocks", "25", *PRIORITY),
    "mixed": (120, 3, "--mode", "mixed"),
    "quantize, priority": (120, 3, "--mode", "quantize", *PRIORITY),
    "sliding windows": (200, 8, "--model", WINDOWED, "--pool-blocks", "38", *SHORT_STEPS),
    "states": (100, 3, "--model", CONVOLVED, "--engine", RIGHT_NORMS),
    "identity, priority": (120, 5, "--identity", *PRIORITY),
}


@pytest.mark.parametrize(
    ("requests", "seed", "flags"), [(r, s, f) for r, s, *f in RUNS.values()], ids=RUNS
)
def test_everything_adds_up_after_every_step(requests, seed, flags):
    arguments = ("--requests", str(requests), "--seed", str(seed), *flags)
    done = run_script(SCRIPT, *arguments, environment=ENGINES, timeout=600)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert f"{requests} requests" in done.stdout
    assert "all adds up" in done.stdout
