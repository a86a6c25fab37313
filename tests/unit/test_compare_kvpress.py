"""The comparison with kvpress: arithmetic and refusals, without kvpress and without vLLM."""

import io
import subprocess
from pathlib import Path

import compare_kvpress
import numpy as np
import pytest
from rich.console import Console

from benchmarks import kvpress_venv
from benchmarks.comparison_report import accuracy_table, cell, kvpress_rows, spearman
from vllm_kvzip.errors import ConfigError
from vllm_kvzip.evaluation.model_files import fingerprint_of, repeat_ids

ROOT = Path(__file__).parent.parent.parent
MODEL = str(ROOT / "tests" / "models" / "tiny-retriever")


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        ([10, 20, 30, 40, 50], [1, 3, 2, 5, 4], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 3], [30, 20, 10], -1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / 22.5**0.5),  # the tied ones share rank 1.5
    ],
)
def test_rank_correlation(first, second, wanted):
    assert spearman(np.array(first), np.array(second)) == pytest.approx(wanted)


def test_rank_correlation_of_scores_does_not_depend_on_their_scale():
    scores = np.random.default_rng(0).random((2, 3, 50), dtype=np.float32)
    assert spearman(scores, scores**3 + 1) == pytest.approx(1)


@pytest.mark.parametrize(
    ("keep_ratio", "context_tokens", "kept_tokens"),
    [
        (0.3, 1024, 10 * 32),  # 9.6 of 32 blocks, rounded up
        (0.3, 1040, 10 * 32 + 16),  # the last 16 tokens fill no block
        (0.01, 1024, 32),  # every head keeps a page
        (1.0, 1024, 1024),
    ],
)
def test_ours_holds_whole_blocks_and_a_tail(keep_ratio, context_tokens, kept_tokens):
    settings = compare_kvpress.settings_of("default", keep_ratio)
    share = compare_kvpress.held_share(settings, context_tokens)
    assert share == pytest.approx(kept_tokens / context_tokens)


def found_bytes(right, kept, held, before):
    names = ("answers", "kept_bytes", "held_bytes", "held_before_decode_bytes")
    return dict(zip(names, ([[right, 10]], kept, held, before), strict=True))


def test_kvpress_bytes_become_shares_of_the_uncompressed_cache():
    found = {
        "none": {"all": found_bytes(9, 4096, 4096, 4096)},
        "kvzip": {"0.5": found_bytes(8, 2048, 4096, 6144)},  # masked only
        "keydiff": {"0.5": found_bytes(3, 2048, 2048, 2048)},  # really shorter
    }
    none, rows = kvpress_rows({"cells": found}, columns=["0.5"])
    assert (none["accuracy"], none["held"]) == (0.9, 1.0)
    masked, freed = rows["kvpress: KVzip"]["0.5"], rows["kvpress: KeyDiff"]["0.5"]
    assert (masked["kept"], masked["held"], masked["held_before_decode"]) == (0.5, 1.0, 1.5)
    assert (freed["accuracy"], freed["kept"], freed["held"]) == (0.3, 0.5, 0.5)


def test_the_table_shows_interval_and_what_is_held_at_the_last_ratio():
    cells = {"0.5": cell([(10, 10)], 0.5, 0.5), "0.1": cell([(0, 10)], 0.125, 0.125)}
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(accuracy_table("title", ["0.5", "0.1"], {"ours: kvzip": cells}))
    text = console.export_text()
    assert "1.000 [0.72 1.00]" in text and "0.000 [0.00 0.28]" in text
    assert "held at 0.1" in text and "0.125" in text


def test_the_wording_is_that_of_the_head_profile():
    fingerprint = fingerprint_of(MODEL)
    assert repeat_ids(MODEL, fingerprint, None) == [[6], [6]]  # repeat
    assert repeat_ids(MODEL, fingerprint, "k0 ?") == [[7, 5], [7, 5]]


def test_the_job_knows_every_method():
    source = (ROOT / "scripts" / "benchmarks" / "kvpress_job.py").read_text()
    assert all(f'"{method}"' in source for method in kvpress_venv.METHODS)
    assert "vllm_kvzip" not in source.replace("compare_kvpress", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "/no/such/model"],
            "--model /no/such/model has no configuration to compare with",
        ),
        (["--methods", "keydif"], "--methods: there is no keydif; did you mean keydiff?"),
        (["--ours", "kvzap"], "--ours: there is no kvzap; did you mean kvzip?"),
        (["--ours", "kvzip+even"], "budget='even' is wrong"),
        (["--tasks", "neddle"], "--tasks: there is no neddle; did you mean needle?"),
        (["--tasks", "chain"], "--tasks chain: the model does not know the words"),
        (["--keep-ratios", "0"], "--keep-ratios 0 must be above 0 and at most 1"),
        (["--keep-ratios", "0.5", "1.5"], "--keep-ratios 1.5 must be above 0 and at most 1"),
        (["--keep-ratios", "0.99"], "--keep-ratios 0.99 frees no block of 32 tokens"),
        (["--context-tokens", "2048"], "--context-tokens 2048 must be from 96 to 1984"),
        (["--questions", "0"], "--questions must be at least 1"),
        (["--json", "/no/such/folder/x"], "/no/such/folder/x cannot be written"),
        (
            ["--venv", str(ROOT / "tests")],
            "tests cannot be made (it is a folder of something else)",
        ),
    ],
)
def test_wrong_input_is_one_sentence(capsys, arguments, message):
    assert compare_kvpress.main(["--model", MODEL, *arguments]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and message in errors[0]


def test_an_environment_with_the_stamp_is_taken_as_it_is(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    stamp = f"torch {kvpress_venv.TORCH_VERSION}, kvpress {kvpress_venv.KVPRESS_VERSION}\n"
    (tmp_path / ".kvpress-ready").write_text(stamp)
    assert kvpress_venv.kvpress_python(tmp_path) == tmp_path / "bin" / "python"


def test_torch_comes_first_and_a_failure_leaves_no_stamp(tmp_path, monkeypatch):
    commands = []

    def fail_to_install(command, check=False, **_):
        commands.append(command)
        Path(tmp_path, "venv").mkdir(exist_ok=True)
        if check and "pip" in command:
            raise subprocess.CalledProcessError(1, "pip install")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(kvpress_venv.subprocess, "run", fail_to_install)
    with pytest.raises(ConfigError, match="cannot be made"):
        kvpress_venv.kvpress_python(tmp_path / "venv")
    assert [command[-1] for command in commands[1:]] == [
        f"torch=={kvpress_venv.TORCH_VERSION}+cpu",
        kvpress_venv.TORCH_CPU_INDEX,
    ]
    assert not (tmp_path / "venv" / ".kvpress-ready").exists()
