"""The README's demo does what the README says."""

import subprocess
import sys
from pathlib import Path

import demo
import pytest
from real_model import ModelUnavailable

from demos import text
from demos.words import conclude

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

DEMO = Path(__file__).parent.parent.parent / "scripts" / "demo.py"


def test_demo_answers_alike_and_frees_blocks():
    command = [sys.executable, str(DEMO), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    results = [line.split() for line in lines if "words right" in line]
    assert [int(words[0]) for words in results] == [128, 128]
    without, compressed = (int(words[5]) for words in results)
    assert compressed < 0.6 * without  # 0.35, and what a slow client lets a server write ahead
    assert any("blocks went back to the pool" in line for line in lines)


def test_the_demos_document_hides_one_answer():
    document = text.document()
    assert document.count(text.ANSWER) == document.count(text.FACT) == 1
    assert 0.3 < document.index(text.FACT) / len(document) < 0.7
    assert 2000 < len(document.split()) < 2500


def test_the_demo_says_when_it_runs_on_the_tiny_model(monkeypatch, capsys):
    def refuse():
        raise ModelUnavailable("the index cannot be reached.")

    monkeypatch.setattr(demo, "real_model", refuse)
    monkeypatch.setattr(demo, "words_demo", lambda: 7)
    monkeypatch.setattr("sys.argv", ["demo.py"])
    assert demo.main() == 7
    assert "tiny test model" in capsys.readouterr().out


def test_the_demo_fails_when_nothing_was_freed():
    freed = {"vllm_kvzip_blocks_freed_total": 5.0}
    assert conclude(90, 40, freed) == 0
    assert conclude(90, 40, {}) == 1
    assert conclude(90, 90, freed) == 1


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
