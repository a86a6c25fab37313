"""Head scores of others become profiles; the files are made here, in their formats."""

import import_profile
import numpy as np
import pytest
import torch
from engine_job import MODEL

from vllm_kvzip.head_profiles.head_profile import load_profile

LAYERS, HEADS = 4, 4  # of the tiny model


def run(capsys, tmp_path, *scores):
    out = tmp_path / "imported.json"
    flags = ["--model", str(MODEL), "--out", str(out), "--scores", *map(str, scores)]
    code = import_profile.main(flags)
    return code, capsys.readouterr().err, out


def test_kvzip_files_are_combined_by_their_maximum(capsys, tmp_path):
    torch.manual_seed(0)
    first, second = torch.rand(LAYERS, HEADS), torch.rand(LAYERS, HEADS)
    for name, scores in (("a.pt", first), ("b.pt", second)):
        torch.save(scores.to(torch.bfloat16), tmp_path / name)
    code, _, out = run(capsys, tmp_path, tmp_path / "a.pt", tmp_path / "b.pt")
    assert code == 0
    profile = load_profile(out)
    wanted = first.to(torch.bfloat16).maximum(second.to(torch.bfloat16)).double()
    assert np.allclose(profile.importance, wanted, atol=1e-4)  # profiles have four decimals
    assert profile.model.name == "tiny-retriever"
    half = torch.tensor(profile.fractions(0.5))
    best = wanted.flatten().argsort(descending=True)[:8]
    assert set(half.flatten().nonzero().flatten().tolist()) == set(best.tolist())
    assert float(half.mean()) == pytest.approx(0.5)


def test_a_duoattention_pattern_is_clipped(capsys, tmp_path):
    pattern = np.linspace(0.0, 1.2, LAYERS * HEADS).reshape(LAYERS, HEADS)
    path = tmp_path / "full_attention_heads.tsv"
    np.savetxt(path, pattern, delimiter="\t")
    code, _, out = run(capsys, tmp_path, path)
    assert code == 0
    assert np.allclose(load_profile(out).importance, pattern.clip(0, 1), atol=1e-4)


@pytest.mark.parametrize("kept", [True, False])
def test_lu_kv_curves_are_budgets_whichever_way_they_count(capsys, tmp_path, kept):
    rng = np.random.default_rng(1)
    tilt = rng.uniform(-1, 1, (LAYERS, HEADS))
    shares = np.arange(1, 100)[:, None, None] / 100
    curves = shares + (tilt - tilt.mean()) * shares * (1 - shares) * 0.5
    path = tmp_path / "budgets.npy"
    np.save(path, curves if kept else curves[::-1])
    code, _, out = run(capsys, tmp_path, path)
    assert code == 0
    assert np.allclose(load_profile(out).fractions(0.3), curves[29], atol=1e-4)


def broken(tmp_path, name, write):
    path = tmp_path / name
    write(path)
    return path


@pytest.mark.parametrize(
    ("name", "write", "sentence"),
    [
        ("a.pt", lambda p: torch.save(torch.rand(2, 4), p), "[2, 4], the model needs [4, 4]"),
        ("a.pt", lambda p: torch.save({"x": 1}, p), "holds a dict, not a tensor"),
        ("a.pt", lambda p: p.write_text("no"), "cannot be read"),
        ("a.pt", lambda p: torch.save(-torch.rand(4, 4), p), "must hold finite numbers"),
        ("a.tsv", lambda p: p.write_text("a\tb\n"), "cannot be read"),
        ("a.npy", lambda p: np.save(p, np.full((99, 4, 4), 0.9)), "do not average to"),
        ("a.npy", lambda p: np.save(p, np.ones((4, 4))), "the model needs [99, 4, 4]"),
        ("a.csv", lambda p: p.write_text("1"), "must be files of one kind: .pt, .tsv, .npy"),
    ],
)
def test_wrong_files_are_one_sentence(capsys, tmp_path, name, write, sentence):
    code, error, out = run(capsys, tmp_path, broken(tmp_path, name, write))
    assert code == 1
    assert sentence in error
    assert len(error.strip().splitlines()) == 1
    assert not out.exists()


def test_a_model_without_configuration_is_one_sentence(capsys, tmp_path):
    torch.save(torch.rand(4, 4), tmp_path / "a.pt")
    out = tmp_path / "x.json"
    flags = ["--model", str(tmp_path), "--out", str(out), "--scores", str(tmp_path / "a.pt")]
    assert import_profile.main(flags) == 1
    assert "has no configuration to compare with" in capsys.readouterr().err
