"""The page-size experiment keeps what the engine's plan says, and masks the rest."""

import json

import numpy as np
import pytest
import torch
from engine_job import MODEL
from eval_page_size import BUDGETS, Cell, main

from vllm_kvzip.evaluation.tasks.word_tasks import TASKS
from vllm_kvzip.profiling.masked_model import MaskedModel


@pytest.fixture(scope="module")
def model():
    return MaskedModel(str(MODEL))


@pytest.fixture(scope="module")
def document():
    return TASKS["multi-key"](np.random.default_rng(0), 150, 6)


def test_a_mask_that_keeps_everything_changes_nothing(model, document):
    cache = model.read(document.tokens)
    everything = torch.ones(4, 4, 128, dtype=torch.bool)
    own = model.answer(document, cache, None)
    assert model.answer(document, cache, everything) == own
    assert own == [question.answer for question in document.questions]
    assert cache.get_seq_length() == 150


def test_facts_that_no_head_keeps_cannot_be_told(model, document):
    cache = model.read(document.tokens)
    little = torch.zeros(4, 4, 128, dtype=torch.bool)
    little[:, :, :4] = little[:, :, -16:] = True
    assert model.answer(document, cache, little) != model.answer(document, cache, None)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("page_size", [1, 16, 32])
def test_as_many_pairs_are_kept_as_the_plan_says(budget, page_size):
    scores = torch.rand(4, 4, 150)
    cell = Cell(budget, page_size, 0.3)
    _, plan = cell.plan(150)
    kept = cell.kept_pairs(scores)
    assert kept.shape == (4, 4, plan.boundary_tokens)
    assert int(kept.sum()) == plan.num_compressed_blocks * page_size * 16
    assert kept[:, :, :4].all() and kept[:, :, -16:].all()
    per_layer = kept.sum(dim=(1, 2))
    if budget != "adaptive":
        assert len(per_layer.unique()) == 1


def test_what_the_engine_leaves_alone_is_left_alone():
    assert Cell("adaptive", 128, 0.99).kept_pairs(torch.rand(4, 4, 150)) is None


def test_it_prints_writes_and_draws(tmp_path, capsys):
    files = ["--json", str(tmp_path / "a.json"), "--heat-map", str(tmp_path / "a.png")]
    few = ["--num-contexts", "1", "--questions", "2", "--context-tokens", "160"]
    grid = ["--page-sizes", "1", "32", "--keep-ratios", "0.5", "--budgets", "adaptive"]
    assert main(["--model", str(MODEL), *files, *few, *grid]) == 0
    assert "budget adaptive" in capsys.readouterr().out
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["no compression"]["accuracy"] == 1.0
    assert found["adaptive"]["1"]["0.5"]["lost"] == pytest.approx(0, abs=0.1)
    assert found["adaptive"]["32"]["0.5"]["held"] == pytest.approx(0.6)  # 3 blocks of 5
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "there is no such folder"),
        (["--keep-ratios", "0"], "--keep-ratios must be above 0 and at most 1"),
        (["--page-sizes", "2000"], "--page-sizes must be 1 to 1024"),
        (["--tasks", "chain"], "the model does not know the words of that task"),
        (["--json", "/no/such/folder/x"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_sentence(capsys, arguments, message):
    assert main(["--model", str(MODEL), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("eval_page_size: error: ") and message in line
