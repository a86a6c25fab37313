"""The evaluation's intervals, its questions, its rows and what it says is held."""

import argparse
import io

import numpy as np
import pytest
from engine_job import MODEL
from rich.console import Console

from vllm_kvzip.config import load_config
from vllm_kvzip.errors import ConfigError
from vllm_kvzip.evaluation.intervals import (
    accuracy,
    interval,
    mean_of_clusters,
    rank_correlation,
    student_t,
)
from vllm_kvzip.evaluation.quality.command import formats, parse_args, setting
from vllm_kvzip.evaluation.quality.lessons import Lesson
from vllm_kvzip.evaluation.quality.metrics import Answers, Measured
from vllm_kvzip.evaluation.quality.report import (
    cell,
    curve,
    draw,
    loss,
    promise_kept,
    quality_table,
    recommend,
    serve_flags,
)
from vllm_kvzip.evaluation.quality.rows import ROWS, Row, make_rows, settings_of
from vllm_kvzip.evaluation.quality.run import groups_that_fit, held_share
from vllm_kvzip.evaluation.tasks.documents import Document, Question
from vllm_kvzip.evaluation.tasks.quality_documents import check_tasks, default_tasks
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY
from vllm_kvzip.evaluation.tasks.word_tasks import HOPS, TASKS, VALUES_PER_KEY, known_tasks

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
        with pytest.raises(argparse.ArgumentTypeError, match="int4, int8, nf4"):
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
    found = Measured()
    for document, outputs in ((first, [[1, 0], [3]]), (second, [[0]])):
        found.add(document, [Answers(greedy=Lesson(output=output)) for output in outputs])
    assert found.counts == [(2, 3), (0, 1)]


def test_a_whole_answer_counts_once_and_by_its_scored_tokens():
    question = Question([], [5, 6, 7], scored=[True, True, False], is_whole=True)
    found = Measured()
    for output in ([5, 6, 0], [5, 0, 7]):
        found.add(Document([], [question]), [Answers(greedy=Lesson(output=output))])
    assert found.counts == [(1, 1), (0, 1)]


def test_lost_nats_are_those_of_scored_tokens_over_the_other_run():
    document = Document([], [Question([], [5, 6], scored=[False, True])])
    runs = []
    for nats in (0.25, 1.0):
        runs.append(Measured())
        for shift in (0.0, 0.5):
            forced = Lesson([5, 6], log_likelihoods={0: -9.0, 1: -nats - shift})
            runs[-1].add(document, [Answers(forced=forced)])
    lost = runs[1].lost_nats(runs[0])
    assert (lost.mean, lost.low, lost.high) == pytest.approx((0.75, 0.75, 0.75))
    assert runs[0].mean_nats().mean == pytest.approx(0.5)
    assert runs[0].divergence() is None


def test_students_t_is_the_tables():
    for freedom, expected in ((5, 2.571), (15, 2.131), (100, 1.984)):
        assert student_t(freedom) == pytest.approx(expected, abs=0.005)


def test_the_interval_of_a_mean_widens_when_clusters_differ():
    apart = mean_of_clusters([(1.0, 2), (3.0, 2), (1.0, 2), (3.0, 2)])
    alike = mean_of_clusters([(2.0, 2)] * 4)
    assert apart.mean == alike.mean == 1.0
    assert alike.low == alike.high == 1.0
    assert apart.high - apart.low > 1
    assert mean_of_clusters([]) is None


def test_groups_of_documents_fit_and_keep_their_order():
    documents = [Document([0] * 320, [Question([0] * 32, [1])]) for _ in range(7)]
    groups = groups_that_fit(documents, num_blocks=100, continuation_tokens=8)
    assert [number for group in groups for number in group] == list(range(7))
    assert len(groups) > 1 and len(groups[0]) > 1


def test_each_model_is_asked_what_it_knows():
    for vocabulary_size, other in ((515, "facts"), (49152, "needle")):
        check_tasks(default_tasks(vocabulary_size), vocabulary_size)
        with pytest.raises(ConfigError, match=f"--tasks {other}"):
            check_tasks([other], vocabulary_size)


def test_a_setting_is_json_or_text():
    assert setting("profile=none") == ("profile", "none")
    assert setting("sink_tokens=8") == ("sink_tokens", 8)
    with pytest.raises(argparse.ArgumentTypeError, match="name=value"):
        setting("profile")


def measured(right, held, nats=None):
    """Four contexts of ten questions, with nats a token where they are given."""
    found = Measured(counts=[(right, 10)] * 4, held=held)
    found.nats = [(0.0, 0)] * 4 if nats is None else [(10 * nats, 10)] * 4
    return found


def measured_rows(nats=(None, None, None)):
    """Two rows, one of them with a single cell; and the uncompressed run's."""
    full = measured(9, 1.0, None if nats[0] is None else 0.5)
    return {
        "quantize, nothing evicted": {"all": cell(measured(9, 0.28125, nats[0]), full)},
        "kvzip, evict": {
            "0.5": cell(measured(9, 0.53, nats[1]), full),
            "0.25": cell(measured(2, 0.25, nats[2]), full),
        },
    }


NATS = (0.6, 0.52, 0.9)


def table_lines(rows):
    columns = {"all": "all KV pairs", "0.5": "bytes 0.5", "0.25": "bytes 0.25"}
    console = Console(width=118, file=io.StringIO())
    console.print(quality_table("title", columns, rows))
    return [
        [part.strip() for part in line.split("│")[1:-1]]
        for line in console.file.getvalue().splitlines()
        if "│" in line
    ]


def test_the_table_says_what_is_held_and_leaves_other_cells_empty():
    lines = table_lines(measured_rows())
    assert lines[0][0] == "quantize, nothing evicted"
    assert [part[:5] for part in lines[0][1:]] == ["0.900", "", ""]
    assert lines[1] == ["", "(0.281 held)", "", ""]
    assert [part[:5] for part in lines[2][1:]] == ["", "0.900", "0.200"]
    assert lines[3] == ["", "", "(0.530 held)", "(0.250 held)"]


def test_the_table_says_what_is_lost():
    lines = table_lines(measured_rows(NATS))
    assert lines[1][1].startswith("lost 0.100 [0.10 0.10]")
    assert [part[:10] for part in lines[4][2:]] == ["lost 0.020", "lost 0.400"]


def test_the_plot_is_over_what_is_held():
    rows = measured_rows()
    assert curve(rows["kvzip, evict"]) == [(0.25, 0.2), (0.53, 0.9)]
    assert curve(rows["quantize, nothing evicted"]) == [(0.28125, 0.9)]
    lost = curve(measured_rows(NATS)["kvzip, evict"])
    assert [held for held, _ in lost] == [0.25, 0.53]
    assert [nats for _, nats in lost] == pytest.approx([0.4, 0.02])


def test_loss_without_reference_answers_is_the_divergence():
    found = Measured(counts=[(0, 0)], nats=[(0.0, 0)], divergences=[(0.6, 3)])
    found.same_choices = [(2, 3)]
    shown = cell(found, Measured(nats=[(0.0, 0)]))
    assert "accuracy" not in shown
    assert loss(shown) == pytest.approx(0.2)
    assert shown["same"] == {"mean": pytest.approx(2 / 3), "low": None, "high": None}


def test_the_recommendation_is_the_smallest_cache_within_the_loss():
    rows = measured_rows(NATS)
    settings = {
        "quantize, nothing evicted": {"all": {"mode": "quantize", "min_prompt_tokens": 0}},
        "kvzip, evict": {"0.5": {"keep_ratio": 0.5}, "0.25": {"keep_ratio": 0.25}},
    }
    for most, expected in ((0.03, "keep_ratio=0.5"), (0.2, "mode=quantize"), (1, "=0.25")):
        assert recommend(rows, settings, most).endswith(expected)
    assert "Nothing" in recommend(rows, settings, 0.01)
    flags = serve_flags({"keep_ratio": 0.3, "min_prompt_tokens": 0})
    assert flags == "--kv-compression kvzip --kv-compression-config.keep_ratio=0.3"


@pytest.mark.parametrize("nats", [NATS, (None, None, None)])
def test_the_plot_is_drawn(tmp_path, nats):
    path = tmp_path / "plot.png"
    draw(path, measured_rows(nats))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 999]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [5, 4, 1, 0]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486833)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) == 0


def promised(estimates, measured, held):
    found = Measured(
        counts=[(0, 0)] * len(measured),
        nats=[(0.0, 0)] * len(measured),
        divergences=[(nats * 10, 10) for nats in measured],
        same_choices=[(9, 10)] * len(measured),
    )
    for estimate, blocks in zip(estimates, held, strict=True):
        found.tell({"blocks_held": blocks, "blocks_before": 20, "estimated_loss": estimate})
    return found


def test_the_report_says_how_well_a_promise_was_kept():
    cells = {
        "0.02": promised([0.02, 0.018], [0.01, 0.03], [4, 8]),
        "0.1": promised([0.1, 0.09], [0.2, 0.1], [2, 3]),
    }
    said = promise_kept(cells)
    assert "4 compressed contexts: rank correlation 0.80" in said
    assert "mean estimate 0.057, mean measured 0.085, bias -0.028 nats" in said
    assert promise_kept({"0.5": Measured(divergences=[(1.0, 10)])}) == ""
    first = cells["0.02"].of([True, True])
    assert first.held == 12 / 40
    shown = cell(first, first)
    assert (shown["estimated"], shown["most_held"]) == (pytest.approx(0.019), 0.4)
    out = io.StringIO()
    Console(file=out, width=200).print(
        quality_table("t", {"0.02": "loss 0.02"}, {"x": {"0.02": shown}})
    )
    assert "estimated 0.019" in out.getvalue()
    assert "(0.300 held, up to 0.400)" in out.getvalue()
