"""Tasks of running text: lengths, answers that stand in the context, and lessons."""

import numpy as np
import pytest
import torch
from letter_tokenizer import TEMPLATE, letter_tokenizer

from vllm_kvzip.errors import ConfigError
from vllm_kvzip.evaluation.quality.lessons import Lesson, divergence
from vllm_kvzip.evaluation.tasks.text_frame import TextFrame
from vllm_kvzip.evaluation.tasks.text_source import load_text, split_pieces
from vllm_kvzip.evaluation.tasks.text_tasks import TEXT_TASKS, cloze_cut
from vllm_kvzip.evaluation.tasks.text_weaving import Weaver

HAVE_ANSWER = ("facts", "many-facts", "cloze", "verbatim")  # word for word in the context
NUM_TOKENS = 1500


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "chat"])
def weaver(request):
    frame = TextFrame.of(letter_tokenizer(request.param))
    return Weaver(load_text(None, NUM_TOKENS, frame), frame)


@pytest.mark.parametrize("task", list(TEXT_TASKS))
def test_contexts_have_their_length_and_questions_their_answer(weaver, task):
    document = TEXT_TASKS[task](weaver, np.random.default_rng(3), NUM_TOKENS, 2)
    decode = weaver.frame.tokenizer.decode
    text = decode(document.tokens)
    assert len(document.tokens) == NUM_TOKENS
    assert 1 <= len(document.questions) <= 2
    for question in document.questions:
        answer = decode(question.answer)
        assert bool(question.scored_places) == (task != "open")
        if task in HAVE_ANSWER:
            assert answer.strip() in text
        elif task in ("values", "several"):
            codes = [word.strip(".,") for word in answer.split() if word[0].isdigit()]
            assert len(codes) == 3 and all(f" {code}." in text for code in codes)


def test_a_chat_template_stands_around_context_and_question():
    frame = TextFrame.of(letter_tokenizer(TEMPLATE))
    decode = frame.tokenizer.decode
    assert decode(frame.context("Text.", 100)) == "<user>Text."
    question = frame.question("Why?", "It is", " so.")
    assert decode(question.asked) == "\n\nWhy?"
    assert decode(question.tokens) == "\n\nWhy?</user><assistant>It is"
    assert decode(question.answer) == " so."


def test_only_digits_of_a_code_are_scored():
    question = TextFrame.of(letter_tokenizer()).question("Which?", "It is", " 4821.")
    assert question.scored == [False, True, True, True, True, False]


def test_pieces_are_the_text():
    text = 'One. "Two?" Three\nfour! Five'
    assert split_pieces(text) == ["One. ", '"Two?" ', "Three\n", "four! ", "Five"]


def test_a_sentence_goes_on_with_its_number_name_or_long_word():
    start = "It was said in the town that they "
    for end, expected in (
        ("met 12 men.", "12"),
        ("met Ada there.", "Ada"),
        ("slept in it.", "slept"),
        ("left.", None),
    ):
        cut = cloze_cut(start + end)
        assert (None if cut is None else (start + end)[slice(*cut)]) == expected


def test_text_that_is_too_short_or_missing_is_refused(tmp_path):
    frame = TextFrame.of(letter_tokenizer())
    path = tmp_path / "short.txt"
    path.write_text("A short text.")
    weaver = Weaver(load_text([str(path)], 500, frame), frame)
    with pytest.raises(ConfigError, match="too few for contexts"):
        TEXT_TASKS["open"](weaver, np.random.default_rng(0), 500, 1)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_text([str(tmp_path / "none.txt")], 500, frame)


def test_a_lesson_records_and_leads():
    logits = torch.tensor([1.0, 2.0, 0.5])
    expected = logits.log_softmax(0)
    own = Lesson(length=1, keeps_distributions=True)
    own.follow(logits, 0)
    assert logits.argmax() == 1  # left alone
    led = Lesson([2], reference=own.distributions)
    led.follow(logits, 0)
    assert logits.argmax() == 2 and logits[0] == float("-inf")
    assert led.log_likelihoods[0] == pytest.approx(float(expected[2]))
    assert led.divergences[0] == pytest.approx(0, abs=1e-6) and led.same_choices[0]


def test_divergence_is_kullback_and_leiblers():
    first, second = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert divergence(first, second) == pytest.approx(expected, rel=1e-5)
    certain = torch.tensor([1.0, 0.0]).log()
    assert divergence(certain, second) == pytest.approx(-np.log(0.9), rel=1e-5)
