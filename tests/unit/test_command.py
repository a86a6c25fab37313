"""The installed command: its help, its subcommands' flags, and where the model may stand."""

import subprocess
import sys

import pytest

from vllm_kvzip import __version__
from vllm_kvzip.command import main as command

QUICK = """
import sys
from vllm_kvzip.command.main import main
try:
    main(sys.argv[1:])
finally:
    assert not {"torch", "vllm", "transformers"} & set(sys.modules)
"""


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        command.main(list(arguments))
    return stopped.value.code, "".join(capsys.readouterr())


@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_load_nothing(flag):
    done = subprocess.run([sys.executable, "-c", QUICK, flag], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = [*command.SUBCOMMANDS] if flag == "--help" else [__version__]
    assert all(word in done.stdout for word in shown)


@pytest.mark.parametrize(
    ("subcommand", "flags"),
    [
        ("profile", ["--model", "--text", "--out", "--overwrite", "--no-surrogate", "--threads"]),
        ("import-scores", ["--model", "--scores", "--out"]),
        ("evaluate", ["--model", "--text", "--max-loss", "--keep-bytes-ratios", "--settings"]),
        ("doctor", ["--model", "--memory-gib", "--prompt-tokens", "--json", "vllm serve"]),
    ],
)
def test_subcommands_know_their_flags(capsys, subcommand, flags):
    code, text = said(capsys, subcommand, "--help")
    assert code == 0
    assert f"usage: vllm-kvzip {subcommand}" in text
    assert all(flag in text for flag in flags)


def test_wrong_subcommands_are_refused(capsys):
    for arguments in ([], ["profiles"]):
        code, text = said(capsys, *arguments)
        assert code == 2
        assert "usage: vllm-kvzip" in text


@pytest.mark.parametrize("arguments", [["/no/model"], ["--model", "/no/model"]])
def test_the_model_may_stand_first(capsys, tmp_path, arguments):
    code = command.main(["profile", *arguments, "--out", str(tmp_path / "x.json")])
    assert code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("vllm-kvzip profile: error: --model /no/model cannot be profiled")


def test_a_model_given_twice_is_refused(capsys):
    code, text = said(capsys, "evaluate", "a", "--model=b")
    assert code == 2
    assert "the model is given twice" in text
