"""The evaluation's intervals and its questions."""

import numpy as np
import pytest
from evaluation import accuracy, interval
from quality_tasks import HOPS, TASKS, VALUES_PER_KEY, known_tasks
from retrieval_task import VOCABULARY


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
