"""What quantized pages lose stays within what is promised, by the script's own functions."""

import json

import pytest
from eval_quantization import formats, main, page_layout, synthetic_losses


@pytest.fixture(scope="module")
def losses():
    wanted = ["int8", "nf4, blocks of 64", "nf4 with double quantization, blocks of 32"]
    return {
        (name, rotated): synthetic_losses(formats(128)[name], rotated=rotated, num_tokens=1024)
        for name in wanted
        for rotated in (False, True)
    }


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(
    ("name", "cosine", "bits"),
    [
        ("int8", 0.9999, 8.25),
        ("nf4, blocks of 64", 0.9948, 4.5),
        ("nf4 with double quantization, blocks of 32", 0.9948, 4.5),
    ],
)
def test_similarity_to_synthetic_vectors(losses, name, cosine, bits, rotated):
    """Outliers in a few dimensions cost similarity; the rotation gives it back."""
    found = {kind: loss.cosine for kind, loss in losses[name, rotated].items()}
    if not rotated:
        assert found.pop("outlier-heavy") < cosine
    assert min(found.values()) >= cosine
    form = formats(128)[name]
    assert form.bits_per_value(128, page_layout(form, 128).page_tokens) <= bits


def test_smaller_blocks_with_double_quantization_need_no_rotation_on_average(losses):
    found = losses["nf4 with double quantization, blocks of 32", False].values()
    assert sum(loss.cosine for loss in found) / 4 >= 0.9948


@pytest.mark.slow
def test_keys_and_values_of_a_model(monkeypatch, tmp_path, capsys):
    """The script's own tables, on few vectors."""
    file = tmp_path / "found.json"
    arguments = ["--vectors", "40", "--context-tokens", "200", "--json", str(file)]
    monkeypatch.setattr("sys.argv", ["eval_quantization.py", *arguments])
    assert main() == 0
    rows = {row["format"]: row for row in json.loads(file.read_text())["model"]}
    double = "nf4 with double quantization, blocks of 32"
    for name, cosine in (("int8", 0.9999), ("nf4, blocks of 32", 0.9948), (double, 0.9948)):
        for row in (rows[name], rows[f"{name}; rotated"]):
            assert min(loss["cosine"] for loss in row["losses"].values()) >= cosine
    assert rows[double]["bits"] < rows["nf4, blocks of 32"]["bits"] <= 4.5
    assert f"| {double}; rotated | {rows[double]['bits']:.3f} | 60 (3.75x) |" in (
        capsys.readouterr().out
    )
