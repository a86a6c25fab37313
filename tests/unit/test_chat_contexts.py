"""How a conversation goes on from a context, and what its renderings have in common."""

import pytest

from vllm_kvzip.planning.chat_contexts import common_prefix, continuations

IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.parametrize(
    ("content", "text_of"),
    [
        ("document", lambda content: content),
        ([IMAGE, {"type": "text", "text": "document"}], lambda content: content[-1]["text"]),
    ],
)
def test_a_question_may_follow_in_the_users_message(content, text_of):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": content}]
    found = continuations(messages)
    assert [conversation[0] for conversation in found] == [messages[0]] * 2
    texts = [text_of(conversation[-1]["content"]) for conversation in found]
    assert all(text.startswith("document") for text in texts)
    behind = [text.removeprefix("document") for text in texts]
    assert len({text[0] for text in behind}) == 2
    assert text_of(content) == "document"  # what was given is as it was


def test_behind_an_image_a_question_is_a_part_of_its_own():
    (first, _) = continuations([{"role": "user", "content": [IMAGE]}])
    assert first[0]["content"][0] == IMAGE
    assert first[0]["content"][1]["type"] == "text"


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_behind_other_messages_the_user_asks_in_the_next(role):
    messages = [{"role": role, "content": "document"}]
    for conversation in continuations(messages):
        assert conversation[:-1] == messages
        assert conversation[-1]["role"] == "user"
        assert conversation[-1]["content"]


def test_what_all_begin_with():
    assert common_prefix([[1, 2, 3], [1, 2, 4, 5], [1, 2]]) == [1, 2]
    assert common_prefix([[1, 2]]) == [1, 2]
    assert common_prefix([[1], [2]]) == []
