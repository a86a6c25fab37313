"""Claims are checked over the prefixes that they came from.

Chain-of-Verification (Dhuliawala et al., arXiv 2309.11495, section 3.3) lets a model answer check
questions without its draft before its eyes, because it would repeat the draft's mistakes. Here a
claim is cut before what it asserts (a number, else a name), and the model repeats the sentence of
the text from that beginning. What it says then is compared.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_kvzip.client.asking.drafting import claims_of, look_up
from vllm_kvzip.client.asking.prompts import quote_prompt, repeat_prompt, says_not_found
from vllm_kvzip.client.errors import BudgetError
from vllm_kvzip.client.text.words import sentences, words

if TYPE_CHECKING:
    from vllm_kvzip.client.asking.answers import Claim
    from vllm_kvzip.client.asking.budget import Calls
    from vllm_kvzip.client.asking.drafting import AskedPart, Quoting

REPEATED_TOKENS = 32
LEAST_WORDS_BEFORE = 2  # of a claim's beginning
LEAST_LETTERS = 5  # of a word that asserts something, where there is no number and no name

_CAPITAL = re.compile(r"[A-Z\u00c0-\u00de\u0391-\u03a9\u0410-\u042f]")


async def verify(
    calls: Calls, asked: AskedPart, claim: Claim, quoting: Quoting, revisions: int
) -> Claim:
    """A claim with its verdict; revised at most so many times.

    Args:
        calls: to make.
        asked: the part that said it.
        claim: as it was drafted, rejected ones too: a revision may save them.
        quoting: how revised claims are looked up.
        revisions: how often another sentence may take its place.
    """
    try:
        return await _verify(calls, asked, claim, quoting, revisions)
    except BudgetError:
        if claim.verdict == "rejected":
            return claim
        return replace(claim, verdict="unverified", reason="No call was left to check it.")


async def _verify(
    calls: Calls, asked: AskedPart, claim: Claim, quoting: Quoting, revisions: int
) -> Claim:
    cut = assertion(claim.text)
    candidates = []
    if cut is not None:
        begin, end = cut
        opening, asserted = claim.text[:begin].rstrip(), claim.text[begin:end]
        reply = await calls.about(asked.part, repeat_prompt(), REPEATED_TOKENS, opening)
        if begins_with(reply.text, asserted):
            if claim.verdict == "rejected":
                return claim  # what no passage says is not true because it was said twice
            return replace(claim, verdict="confirmed")
        candidates.append(_first_sentence(f"{opening} {reply.text.lstrip()}"))
    has_asked = False
    for number in range(revisions):
        if number >= len(candidates):
            if has_asked:
                break
            has_asked = True
            reply = await calls.about(asked.part, quote_prompt(claim.question), REPEATED_TOKENS * 2)
            candidates += [s for s in claims_of(reply) if not says_not_found(s)][:1]
        if number >= len(candidates):
            break
        revised = look_up(asked, claim.question, candidates[number], "strict")
        if revised.verdict == "quoted":
            if _forms(revised.text) == _forms(claim.text):
                return replace(claim, quote=revised.quote, verdict="confirmed", reason="")
            return replace(revised, verdict="revised", draft=claim.text)
    if claim.verdict == "rejected":
        return claim
    if cut is None and not candidates:
        return replace(
            claim, verdict="unverified", reason="It has no number or name that could be checked."
        )
    said = candidates[0] if candidates else "nothing"
    return replace(claim, verdict="rejected", reason=f"Asked for it again, the model says: {said}")


def assertion(claim: str) -> tuple[int, int] | None:
    """Characters of what a claim asserts; None: there is nothing to tell it by.

    Its last number, else its last name, else its last long word, behind at least two words.
    """
    found = words(claim)[LEAST_WORDS_BEFORE:]
    numbers = [word for word in found if word.is_number]
    names = [word for word in found if _CAPITAL.match(claim[word.start])]
    long = [word for word in found if len(word.form) >= LEAST_LETTERS]
    last = next((kind[-1] for kind in (numbers, names, long) if kind), None)
    if last is None:
        return None
    start = last.start
    if not numbers and names:  # a name of several words is asserted as one
        for word in reversed(found[: found.index(last)]):
            if word not in names or claim[word.end : start].strip():
                break
            start = word.start
    return start, last.end


def begins_with(text: str, asserted: str) -> bool:
    """Whether a text begins with the same words."""
    wanted = _forms(asserted)
    return _forms(text)[: len(wanted)] == wanted


def _forms(text: str) -> list[str]:
    return [word.form for word in words(text)]


def _first_sentence(text: str) -> str:
    spans = sentences(text)
    return text[spans[0][0] : spans[0][1]] if spans else text
