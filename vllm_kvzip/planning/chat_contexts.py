"""Where a context that a chat client names ends: before what a template closes a message with.

A client may ask about a document in the same message or in the next one, and the document may be
the system prompt. A chat template writes other tokens after the document in each case, and the
tokenizer may merge the first word that follows with the document's last one. So the context is what
all conversations that continue from it have in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

Message = dict[str, Any]

_QUESTION = "\n\nWhat is it?"


def continuations(messages: Sequence[Message]) -> list[list[Message]]:
    """Conversations that continue from some messages as a client would.

    Args:
        messages: in the format of the OpenAI API; the last one holds the end of the context.

    Returns:
        two conversations, each with another question. Where the last message is a user's, the
        question follows its text; else it is the user's next message. The second question is the
        text's own first word, because the tokenizer surely knows it.
    """
    last = messages[-1]
    questions = (_QUESTION, f" {_first_word(last.get('content'))}")
    if last.get("role") == "user" and last.get("content"):
        return [[*messages[:-1], _with_text(last, question)] for question in questions]
    return [[*messages, {"role": "user", "content": q.strip()}] for q in questions]


def common_prefix(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The token ids that all sequences begin with; there is one sequence at least."""
    shared = []
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        shared.append(tokens[0])
    return shared


def _first_word(content: Any) -> str:
    parts = [content] if isinstance(content, str) else content or []
    texts = [part if isinstance(part, str) else part.get("text") or "" for part in parts]
    return next(iter(" ".join(texts).split()), "And")


def _with_text(message: Message, text: str) -> Message:
    """A message with more text at its end, which is a string or a list of parts."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + text}
    *before, last = content
    if isinstance(last, dict) and last.get("type") == "text":
        return {**message, "content": [*before, {**last, "text": last["text"] + text}]}
    return {**message, "content": [*content, {"type": "text", "text": text}]}
