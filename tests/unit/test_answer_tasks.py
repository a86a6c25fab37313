"""Answers whose end repeats what their beginning said."""

import re

import numpy as np
import pytest
from letter_tokenizer import TEMPLATE, letter_tokenizer

from vllm_kvzip.evaluation.tasks.answer_tasks import ANSWER_TASKS, NUM_FACTS, make_answer
from vllm_kvzip.evaluation.tasks.text_frame import TextFrame

NUM_TOKENS = 6000  # of one byte each


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "chat"])
def frame(request):
    return TextFrame.of(letter_tokenizer(request.param))


def answer_of(task, frame, seed=1):
    return make_answer(task, frame, np.random.default_rng(seed), NUM_TOKENS)


@pytest.mark.parametrize("task", ANSWER_TASKS)
def test_what_is_scored_was_said_at_the_beginning_and_long_ago(task, frame):
    answer = answer_of(task, frame)
    assert NUM_TOKENS - 200 < len(answer.tokens) <= NUM_TOKENS
    text = frame.tokenizer.decode(answer.tokens)
    said = frame.tokenizer.decode(answer.tokens[: answer.num_fact_tokens])
    assert said.endswith(".\n") and said.count("\n") == NUM_FACTS
    assert min(answer.scored) > NUM_TOKENS // 2 > 2 * answer.num_fact_tokens
    scored = "".join(text[p] if p in set(answer.scored) else "\n" for p in range(len(text)))
    words = re.findall(r"\w+", scored)
    assert len(words) >= NUM_FACTS
    assert all(re.search(rf"\b{word}\b", said) for word in words)
    ending = text[answer.scored[0] - 60 :]
    assert sum(line in said for line in ending.splitlines() if line) >= NUM_FACTS - 1 or (
        task == "arithmetic"
    )


@pytest.mark.parametrize("task", ANSWER_TASKS)
def test_the_same_seed_gives_the_same_answer(task, frame):
    assert answer_of(task, frame) == answer_of(task, frame)
    assert answer_of(task, frame).tokens != answer_of(task, frame, seed=2).tokens


def test_sums_are_right(frame):
    text = frame.tokenizer.decode(answer_of("arithmetic", frame).tokens)
    sums = {name: (int(a), int(b), int(c)) for name, a, b, c in re.findall(
        r"The (\w+) sum is (\d+) \+ (\d+) = (\d+)\.", text)}  # fmt: skip
    again = re.findall(r"The (\w+) sum was (\d+), and with (\d+) more it is (\d+)\.", text)
    assert len(sums) == len(again) == NUM_FACTS
    assert all(a + b == c for a, b, c in sums.values())
    assert all(sums[name][2] == int(a) and int(a) + int(b) == int(c) for name, a, b, c in again)


def test_too_few_tokens_are_refused(frame):
    with pytest.raises(ValueError, match="1000 tokens are too few for an answer of task story"):
        make_answer("story", frame, np.random.default_rng(0), 1000)
