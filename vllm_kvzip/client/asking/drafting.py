"""A part is asked, and each sentence of its draft is looked up in the document."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from vllm_kvzip.client.asking.answers import Claim, Quote
from vllm_kvzip.client.asking.prompts import (
    answer_prompt,
    is_not_found,
    quote_prompt,
    says_not_found,
)
from vllm_kvzip.client.errors import BudgetError
from vllm_kvzip.client.text.words import is_title, sentences, words

if TYPE_CHECKING:
    from vllm_kvzip.client.asking.budget import Calls
    from vllm_kvzip.client.library import ReadPart
    from vllm_kvzip.client.server import Reply
    from vllm_kvzip.client.text.words import Word

Quoting = Literal["asked", "strict", "none"]
"""``strict``: a claim counts if its words, and most of the question's, stand in a passage.
``asked``: else the model is asked for the sentence, which must stand in the document, hold the
claim's numbers and names, and have words of the claim and the question. ``none``: every claim
counts."""

MOST_CLAIMS = 6  # of a draft; what follows is repetition
QUESTION_SHARE = 0.6  # of the weight of a question's words that a passage must hold
COPIED_SHARE = 0.95  # of a copied sentence's weight that must stand in the document
TOUCHED_SHARE = 0.3  # of what a part has of claim and question, that a copied sentence must have

NO_PASSAGE = "No passage of the part says it."
OTHER_PASSAGE = "The passage that says it does not answer the question."
NO_CALL = "No call was left to ask for its passage."


@dataclass(frozen=True)
class AskedPart:
    """A part, and its number among all that are asked."""

    number: int
    part: ReadPart

    def quote(self, start: int, end: int) -> Quote:
        """The passage at characters of the part's text."""
        document, part = self.part.document, self.part.part
        begin = part.start + start
        return Quote(
            document.name, part.number, begin, part.start + end,
            document.text[begin : part.start + end], document.page(begin),
        )  # fmt: skip


async def draft(
    calls: Calls, asked: AskedPart, question: str, quoting: Quoting, answer_tokens: int
) -> list[Claim]:
    """What a part says about a question; empty where the model finds nothing.

    Args:
        calls: to make.
        asked: the part.
        question: a single one.
        quoting: how claims are looked up.
        answer_tokens: of the draft, at most.

    Returns:
        Claims, each with a quote or rejected.
    """
    prompt = answer_prompt(question)
    reply = await calls.about(asked.part, prompt, answer_tokens, is_draft=True)
    claims = [
        look_up(asked, question, text, quoting)
        for text in claims_of(reply)
        if not is_not_found(text)
    ]
    # "It was not found until 1985." may be what the text says
    claims = [c for c in claims if c.verdict == "quoted" or not says_not_found(c.text)]
    if quoting == "asked" and any(claim.verdict == "rejected" for claim in claims):
        try:
            copied = await calls.about(asked.part, quote_prompt(question), answer_tokens)
        except BudgetError:
            return [_rejected(c, NO_CALL) if c.verdict == "rejected" else c for c in claims]
        claims = [_with_copy(asked, claim, copied.text) for claim in claims]
    return claims


def claims_of(reply: Reply) -> list[str]:
    """Sentences of an answer, each once; a last one that was cut off only if it is the only one."""
    found: dict[tuple[str, ...], str] = {}
    spans = sentences(reply.text)
    if not reply.is_whole and len(spans) > 1:
        spans.pop()
    for begin, end in spans:
        text = reply.text[begin:end]
        found.setdefault(tuple(word.form for word in words(text)), text)
    return list(found.values())[:MOST_CLAIMS]


def look_up(asked: AskedPart, question: str, text: str, quoting: Quoting) -> Claim:
    """A claim with the passage that says it, or rejected."""
    claim = Claim(text, question, asked.number, None, "unquoted")
    index = asked.part.index
    support = index.support(text)
    if support is None or not support.is_enough:
        return claim if quoting == "none" else _rejected(claim, NO_PASSAGE)
    quote = asked.quote(support.start, support.end)
    if quoting == "strict" and question_share(asked, question, quote) < QUESTION_SHARE:
        return replace(_rejected(claim, OTHER_PASSAGE), quote=quote)
    return replace(claim, quote=quote, verdict="quoted")


def question_share(asked: AskedPart, question: str, quote: Quote) -> float:
    """Share of the weight of a question's words that stand in a quote, in [0, 1]."""
    whole = asked.part.index.weight(question, question)
    return asked.part.index.weight(quote.text, question) / whole if whole else 1.0


def _with_copy(asked: AskedPart, claim: Claim, copied: str) -> Claim:
    """A rejected claim, accepted if the model's copy stands in the document and is about it."""
    if claim.verdict != "rejected" or is_not_found(copied):
        return claim
    support = asked.part.index.support(copied)
    if support is None or support.missing or support.share < COPIED_SHARE:
        return claim
    quote = asked.quote(support.start, support.end)
    there = {word.form for word in words(quote.text)}
    if any(word.form not in there for word in words(claim.text) if _must_stand(claim.text, word)):
        return claim
    about, index = f"{claim.text} {claim.question}", asked.part.index
    known = index.weight(index.text, about)
    if not known or index.weight(quote.text, about) < TOUCHED_SHARE * known:
        return claim
    return replace(claim, quote=quote, verdict="quoted", reason="")


def _must_stand(claim: str, word: Word) -> bool:
    """Whether a word of a claim is a number or a name, which no paraphrase changes.

    A first word with a capital letter is taken for the sentence's beginning.
    """
    is_name = claim[word.start].isupper() and not is_title(word.form)
    return word.is_number or (is_name and bool(claim[: word.start].strip()))


def _rejected(claim: Claim, reason: str) -> Claim:
    return replace(claim, verdict="rejected", reason=reason)
