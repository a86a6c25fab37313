"""What tests start engines with: each script has a process of its own, and its end is told."""

import os

import pytest
from forked_script import ENGINES, run_script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def run(folder, text, *arguments, timeout=60, **variables):
    script = folder / "script.py"
    script.write_text(text)
    return run_script(script, *arguments, environment={**ENGINES, **variables}, timeout=timeout)


def test_a_script_starts_as_in_a_new_process(tmp_path):
    (tmp_path / "beside.py").write_text("answer = 42")
    text = """
import beside, os, sys, threading
print(os.getppid(), __name__, sys.argv[1:], beside.answer, os.environ["TMPDIR"])
print(sorted(name for name in sys.modules if name.startswith("vllm_kvzip")))
print(threading.active_count(), "vllm" in sys.modules, hasattr(sys, "seen"))
sys.seen = True
"""
    first, second = (run(tmp_path, text, "a", "b", TMPDIR=str(tmp_path)) for _ in range(2))
    assert first.returncode == second.returncode == 0
    told = [done.stdout.splitlines()[:3] for done in (first, second)]
    parent, rest = told[0][0].split(maxsplit=1)
    assert int(parent) not in (os.getpid(), os.getppid())
    assert [rest, *told[0][1:]] == [f"__main__ ['a', 'b'] 42 {tmp_path}", "[]", "1 True False"]
    assert told[1] == told[0]


@pytest.mark.parametrize(
    ("text", "code", "words", "seconds"),
    [
        ("raise ValueError('too many')", 1, "ValueError: too many", 60),
        ("import sys; print('out'); sys.exit(7)", 7, "out", 60),
        ("import os; os.kill(os.getpid(), 9)", -9, "", 60),
        ("print('waits', flush=True); import time; time.sleep(600)", -14, "waits", 5),
    ],
)
def test_how_it_ended_is_told(tmp_path, text, code, words, seconds):
    done = run(tmp_path, text, timeout=seconds)
    assert done.returncode == code
    assert words in (done.stderr if code == 1 else done.stdout)
