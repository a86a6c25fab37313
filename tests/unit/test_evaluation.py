"""The evaluation's intervals, its questions, its rows and what it says is held."""

import argparse
import io

import numpy as np
import pytest
from engine_job import MODEL
from eval_quality import ROWS, Row, formats, make_rows, parse_args, settings_of
from evaluation import accuracy, accuracy_table, cell, curve, draw, interval
from quality_run import held_share, right_tokens
from quality_tasks import HOPS, TASKS, VALUES_PER_KEY, Document, Question, known_tasks
from retrieval_task import VOCABULARY
from rich.console import Console

from vllm_kvzip.config import load_config

MODES = ("evict", "quantize", "mixed")


def test_the_interval_of_single_answers_is_wilsons():
    counts = [(1, 1)] * 8 + [(0, 1)] * 2
    assert accuracy(counts) == 0.8
    low, high = interval(counts)
    assert (low, high) == (pytest.approx(0.490, abs=0.05), pytest.approx(0.943, abs=0.05))


def test_answers_that_stand_or_fall_together_count_as_one():
    apart = [(8, 10)] * 10
    together = [(10, 10)] * 8 + [(0, 10)] * 2
    alone = [(1, 1)] * 8 + [(0, 1)] * 2
    assert interval(together) == pytest.approx(interval(alone), abs=1e-6)
    width = [high - low for low, high in (interval(apart), interval(together))]
    assert width[0] < 0.6 * width[1]


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        chances = rng.beta(8, 2, size=24)  # contexts differ; the mean is 0.8
        counts = [(int(rng.binomial(12, chance)), 12) for chance in chances]
        low, high = interval(counts)
        covered += low <= 0.8 <= high
    assert 900 <= covered <= 985


@pytest.mark.parametrize("task", list(TASKS))
def test_questions_can_be_answered_from_the_context(task):
    document = TASKS[task](np.random.default_rng(1), 400, 6)
    assert len(document.tokens) == 400
    words = document.tokens
    for question in document.questions:
        answer = question.answer
        if task in ("needle", "multi-key"):
            places = [i for i, word in enumerate(words) if word == question.tokens[1]]
            assert [words[i + 1] for i in places] == answer
        elif task == "multi-value":
            places = [i for i, word in enumerate(words) if word == question.tokens[1]]
            assert [words[i + 1] for i in places] == answer
            assert len(set(answer)) == VALUES_PER_KEY
        elif task == "chain":
            at, walked = question.tokens[1], []
            for _ in range(HOPS):
                # A fact's key follows a period or filler, never another key.
                (place,) = [
                    i
                    for i, word in enumerate(words)
                    if word == at and (i == 0 or words[i - 1] not in VOCABULARY.keys)
                ]
                at = words[place + 1]
                walked.append(at)
            assert walked == answer and at in VOCABULARY.values
        elif task == "most":
            found, counts = np.unique(words, return_counts=True)
            assert found[counts.argmax()] == answer[0]
            assert sorted(counts)[-1] > 2 * sorted(counts)[-2]
        else:
            hint = question.tokens[1:]
            places = [i for i in range(400) if words[i : i + len(hint)] == hint]
            assert any(words[i + len(hint) :][: len(answer)] == answer for i in places)


def test_models_know_the_tasks_whose_words_they_have():
    assert "chain" not in known_tasks(512)
    assert set(known_tasks(len(VOCABULARY.words))) == set(TASKS)


def test_a_row_of_evict_asks_for_what_it_always_did():
    for scorer in ROWS:
        assert Row(scorer).settings(0.3, by_bytes=False) == settings_of(scorer, 0.3)
    by_bytes = Row("kvzip").settings(0.3, by_bytes=True)
    assert by_bytes.pop("keep_bytes_ratio") == 0.3
    assert by_bytes == {"scorer": "kvzip", "budget": "adaptive", "min_prompt_tokens": 0}


@pytest.mark.parametrize("by_bytes", [False, True])
def test_every_row_is_a_configuration_with_its_own_name(by_bytes):
    rows = make_rows(ROWS, MODES, ["", "int8", "int8+nf4"], [None, 0.1])
    assert len(rows) == 3 + len(ROWS) * (1 + 3 + 6)
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        config = load_config(row.settings(0.25, by_bytes), {}, None)
        assert config.mode == row.mode
        if row.evicts:
            assert (config.keep_bytes_ratio if by_bytes else config.keep_ratio) == 0.25
        else:
            assert (config.keep_ratio, config.keep_bytes_ratio) == (1.0, None)
    last = load_config(rows[-1].settings(0.25, by_bytes), {}, None)
    assert (last.mode, last.key_format, last.value_format) == ("mixed", "int8", "nf4")
    assert last.full_share == 0.1


def test_only_mode_quantize_has_a_row_that_evicts_nothing():
    for modes in (MODES, ("evict", "mixed")):
        whole = [row for row in make_rows(["kvzip"], modes, ["nf4"], [None]) if not row.evicts]
        assert [row.name for row in whole] == (
            ["quantize nf4, nothing evicted"] if "quantize" in modes else []
        )


def test_formats_are_one_or_two_known_names():
    assert [formats(text) for text in ("nf4", "int8+nf4")] == ["nf4", "int8+nf4"]
    for text in ("fp8", "int8+fp8", "int8+nf4+nf4", "nf4+", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="nf4, int4, int8"):
            formats(text)


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ([], "float32"),
        (["--modes", "mixed"], "float32"),
        (["--keep-bytes-ratios", "0.5"], "bfloat16"),
        (["--keep-bytes-ratios", "0.5", "--dtype", "float32"], "float32"),
    ],
)
def test_bytes_are_compared_in_bfloat16(monkeypatch, given, dtype):
    monkeypatch.setattr("sys.argv", ["eval_quality.py", "--model", str(MODEL), *given])
    assert parse_args().dtype == dtype


def test_held_is_what_was_not_freed():
    documents = [Document(list(range(length)), []) for length in (320, 320 + 31)]
    assert held_share(documents, 0) == 1
    assert held_share(documents, 15) == 0.25  # of 20 whole blocks


def test_right_tokens_are_counted_by_document():
    first = Document([], [Question([], [1, 2]), Question([], [3])])
    second = Document([], [Question([], [4])])
    assert right_tokens([first, second], [[1, 0], [3], [0]]) == [(2, 3), (0, 1)]


def measured_rows():
    """Two rows by bytes, one of them with a single cell."""
    right, wrong = [(9, 10)] * 4, [(2, 10)] * 4
    return {
        "quantize, nothing evicted": {"all": cell(right, 0.28125)},
        "kvzip, evict": {"0.5": cell(right, 0.53), "0.25": cell(wrong, 0.25)},
    }


def test_the_table_says_what_is_held_and_leaves_other_cells_empty():
    columns = {"all": "all KV pairs", "0.5": "bytes 0.5", "0.25": "bytes 0.25"}
    console = Console(width=118, file=io.StringIO())
    console.print(accuracy_table("title", columns, measured_rows()))
    lines = [
        [part.strip() for part in line.split("│")[1:-1]]
        for line in console.file.getvalue().splitlines()
        if "│" in line
    ]
    assert lines[0][0] == "quantize, nothing evicted"
    assert [part[:5] for part in lines[0][1:]] == ["0.900", "", ""]
    assert lines[1] == ["", "(0.281 held)", "", ""]
    assert [part[:5] for part in lines[2][1:]] == ["", "0.900", "0.200"]
    assert lines[3] == ["", "", "(0.530 held)", "(0.250 held)"]


def test_the_plot_is_over_what_is_held():
    rows = measured_rows()
    assert curve(rows["kvzip, evict"]) == [(0.25, 0.2), (0.53, 0.9)]
    assert curve(rows["quantize, nothing evicted"]) == [(0.28125, 0.9)]
    assert curve({"0.5": cell([(1, 2)]), "0.3": cell([(1, 4)])}) == [(0.3, 0.25), (0.5, 0.5)]


def test_the_plot_is_drawn(tmp_path):
    for held in (None, 0.3):
        path = tmp_path / f"{held}.png"
        draw(path, {"kvzip": {"0.3": cell([(9, 10)] * 4, held)}})
        assert path.read_bytes().startswith(b"\x89PNG")
