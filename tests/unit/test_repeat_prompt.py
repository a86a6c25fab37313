"""The wording of the repeat prompt: whose it is, and the turns of a chat around it."""

import pytest
from engine_job import MODEL
from transformers import AutoTokenizer

from vllm_kvzip.head_profiles.head_profile import Provenance
from vllm_kvzip.head_profiles.repeat_prompt import RepeatWording, around_message, repeat_wording
from vllm_kvzip.planning.reconstruction import FIRST_REPEAT_PROMPT, LATER_REPEAT_PROMPT

TURNS = (
    "{{ '<s>' }}{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + "
    "'[end]' }}{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
THINKING = TURNS.replace(
    "'[assistant]'", "'[assistant]' + ('' if enable_thinking else '[no thoughts]')"
)
NO_USER = "{{ raise_exception('roles must alternate') }}"
NO_CONTENT = "{% for message in messages %}{{ message['role'] }}{% endfor %}"


def tokenizer(template):
    found = AutoTokenizer.from_pretrained(MODEL)
    found.chat_template = template
    return found


def made_with(**wording):
    return Provenance(method="m", texts=[], versions={}, created="2026-01-01", **wording)


def test_the_default_closes_the_users_turn_and_opens_the_assistants():
    wording = repeat_wording(None, None, tokenizer(TURNS))
    assert wording.first == FIRST_REPEAT_PROMPT + "[end][assistant]"
    assert wording.later == LATER_REPEAT_PROMPT + "[end][assistant]"


def test_what_comes_before_a_message_is_found_too():
    assert around_message(tokenizer(TURNS)) == ("<s>[user]", "[end][assistant]")


def test_a_thinking_model_is_asked_for_an_answer():
    assert around_message(tokenizer(THINKING))[1] == "[end][assistant][no thoughts]"


@pytest.mark.parametrize("template", [None, NO_USER, NO_CONTENT, "{{ 1 / 0 }}", "{% if %}"])
def test_a_template_that_does_not_work_leaves_the_plain_wording(template):
    plain = RepeatWording(FIRST_REPEAT_PROMPT, LATER_REPEAT_PROMPT)
    assert repeat_wording(None, None, tokenizer(template)) == plain


def test_so_does_one_that_puts_nothing_behind_a_message():
    own = AutoTokenizer.from_pretrained(MODEL)
    assert around_message(own) == ("", "")
    assert repeat_wording(None, None, own).first == FIRST_REPEAT_PROMPT


def test_words_of_the_user_and_of_a_profile_are_taken_literally():
    chat = tokenizer(TURNS)
    made = made_with(repeat_prompt="again", later_repeat_prompt="go on")
    assert repeat_wording("mine", made, chat) == RepeatWording("mine", "mine")
    assert repeat_wording(None, made, chat) == RepeatWording("again", "go on")
    assert repeat_wording(None, made_with(), chat).first.endswith("[assistant]")


def test_a_profile_that_names_one_wording_means_what_it_always_meant():
    chat = tokenizer(TURNS)
    one = made_with(repeat_prompt="again")
    usual = made_with(repeat_prompt=FIRST_REPEAT_PROMPT)
    assert repeat_wording(None, one, chat) == RepeatWording("again", "again")
    plain = RepeatWording(FIRST_REPEAT_PROMPT, LATER_REPEAT_PROMPT)
    assert repeat_wording(None, usual, chat) == plain


def test_a_wording_without_a_token_is_refused():
    with pytest.raises(ValueError, match="' ' has no token in this model's vocabulary"):
        RepeatWording(" ", " ").token_ids(tokenizer(None))
