"""Benchmarks run from one command, and refuse to print figures of a plugin that did nothing."""

import re
from pathlib import Path

import pytest
from forked_script import ENGINES, run_script

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"


def run(script, *arguments):
    done = run_script(SCRIPTS / script, *arguments, environment=ENGINES)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(text):
    """Cells of a Markdown table's rows, without its head."""
    lines = [line for line in text.splitlines() if re.match(r"\|(?!---)", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_overhead_of_engines_that_take_turns():
    small = "--requests 3 --concurrency 2 --prompt-tokens 160 --output-tokens 5 --rounds 1"
    found = rows(run("benchmark_overhead.py", *small.split()))
    assert [row[0] for row in found] == ["stock", "idle", "keep 1.0"]
    assert found[0][2] == "1.000"
    assert all(0.2 < float(row[2]) < 5 for row in found)


def test_the_scheduler_without_a_model():
    small = "--parts scheduler turnover --requests 4 --prompt-tokens 128 --cached 0 40 --steps 3"
    found = rows(run("benchmark_scheduler.py", *small.split()))
    found = [row for row in found if row[0] != "running"]
    assert [row[:3] for row in found] == [["4", "128", cached] for cached in ("0", "40", "40")]
    for *_, held, compressed, _, _, ratio in found:
        assert int(held) == 4 * 5
        assert int(compressed) == 4 * 3  # half of four blocks, and one that is being filled
        assert 0.2 < float(ratio) < 5


def test_the_worker_beside_the_forward_pass():
    small = "--parts worker --requests 4 --prompt-tokens 128 --steps 3"
    ((running, prompt, *_, ratio),) = rows(run("benchmark_scheduler.py", *small.split()))
    assert (running, prompt) == ("4", "128")
    assert 0.2 < float(ratio) < 5


def test_long_answers_hold_their_budget():
    model = SCRIPTS.parent / "tests" / "models" / "tiny-retriever"
    small = f"--model {model} --prompts 1 --tokens 200 --budgets 64 --scorers random"
    text = run("eval_long_answers.py", *small.split())
    # Three between rounds, and two more in the step of one.
    assert re.search(r"random, evict .*\[.*\], 5 blocks", text)
