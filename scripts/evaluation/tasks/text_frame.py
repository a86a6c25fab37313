"""How a document and questions about it become one prompt: the chat template, where there is one.

With a template the user's turn opens before the document and closes behind the question; then the
assistant's turn opens. Without one the question follows as ``Question:`` and ``Answer:``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_kvzip.evaluation.tasks.documents import Question

_HERE = "@document@"  # stands for the user's message while a template is taken apart


@dataclass(frozen=True)
class TextFrame:
    """A tokenizer, and what it puts around a user's message.

    Attributes:
        tokenizer: of transformers.
        head_ids: token ids before the document.
        before_question: text between document and question.
        before_answer: text between question and answer.
        glue: between ``before_answer`` and the answer's first word; an answer in a turn of its own
            begins without a blank.
    """

    tokenizer: Any
    head_ids: list[int]
    before_question: str
    before_answer: str
    glue: str

    @classmethod
    def of(cls, tokenizer: Any) -> TextFrame:
        """What the model was trained to see, as far as its tokenizer says."""
        if not getattr(tokenizer, "chat_template", None):
            with_special, bare = tokenizer("x").input_ids, _ids(tokenizer, "x")
            head = with_special[: len(with_special) - len(bare)]
            if with_special[len(head) :] != bare:
                head = []  # the special tokens stand behind the text
            return cls(tokenizer, head, "\n\nQuestion: ", "\nAnswer:", " ")
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": _HERE}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # templates of models that think aloud know this name
        )
        head, tail = whole.split(_HERE)
        return cls(tokenizer, _ids(tokenizer, head), "\n\n", tail, "")

    def ids(self, text: str) -> list[int]:
        """Token ids of a text without special tokens of its own."""
        return _ids(self.tokenizer, text)

    def context(self, text: str, num_tokens: int) -> list[int]:
        """The document with what stands before it, cut to a length; shorter if the text is."""
        return [*self.head_ids, *self.ids(text)][:num_tokens]

    def question(
        self, asked: str, opening: str = "", answer: str = "", *, is_whole: bool = True
    ) -> Question:
        """A question about a document.

        Args:
            asked: the question.
            opening: first words of the answer, given.
            answer: what should follow, with the blank before it where there is an opening. May be
                empty. Of its tokens those count that hold a digit, if it is right only as a whole
                and has one; else those that hold a letter or a digit.
            is_whole: see :class:`documents.Question`.
        """
        begin = self.before_answer + (self.glue + opening if opening else "")
        asked_ids = self.ids(self.before_question + asked)
        opening_ids, answer_ids = self._split(begin, answer if opening else self.glue + answer)
        if not answer:
            answer_ids = []
        is_number = is_whole and any(map(str.isdigit, answer))
        counts = str.isdigit if is_number else str.isalnum
        return Question(
            tokens=[*asked_ids, *opening_ids],
            answer=answer_ids,
            scored=[any(map(counts, self.tokenizer.decode([i]))) for i in answer_ids],
            is_whole=is_whole,
            num_opening_tokens=len(opening_ids),
        )

    def _split(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Token ids of two texts that follow each other, as they are when they do.

        Some tokenizers put a blank of their own before a text that is tokenized alone.
        """
        if not second.strip() or not self.tokenizer.is_fast:
            return self.ids(first), self.ids(second)
        found = self.tokenizer(
            first + second, add_special_tokens=False, return_offsets_mapping=True
        )
        ids, ends = found["input_ids"], [end for _, end in found["offset_mapping"]]
        num_first = sum(end <= len(first) for end in ends)
        return ids[:num_first], ids[num_first:]


def _ids(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
