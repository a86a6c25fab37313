"""Answers of parts become one answer, by the model where more than one is left.

Recursive Language Models (Zhang et al., arXiv 2512.24601) let a model call itself over parts of a
prompt that is too long for it. Here the tree of calls is fixed: parts, then groups of their
answers, until one call holds all that is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm_kvzip.client.asking.drafting import claims_of, question_share
from vllm_kvzip.client.asking.prompts import merge_prompt, says_not_found
from vllm_kvzip.client.errors import BudgetError
from vllm_kvzip.client.text.quotes import PassageIndex
from vllm_kvzip.client.text.words import words
from vllm_kvzip.client.together import all_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.client.asking.answers import Claim
    from vllm_kvzip.client.asking.budget import Calls
    from vllm_kvzip.client.asking.drafting import AskedPart, Quoting

SAME = 1e-6
MERGED_TOKENS = 192
KEPT_SHARE = 0.75  # of a merged answer's telling words that its notes must hold
TELLING_LETTERS = 4  # of a word that is not just "and" or "the"


@dataclass(frozen=True)
class MergeLimits:
    """When merging ends.

    Attributes:
        fan_in: answers that one call merges, at most.
        most_characters: of the notes of one call.
        most_depth: merges behind each other.
    """

    fan_in: int = 16
    most_characters: int = 8000
    most_depth: int = 4


@dataclass
class Merged:
    """What is left of the claims of all parts.

    Attributes:
        claims: of the answer.
        calls: that merged.
        depth: merges behind each other.
        notes: what did not work, one sentence each.
    """

    claims: list[Claim]
    calls: int = 0
    depth: int = 0
    notes: list[str] = field(default_factory=list)


def distinct(claims: Sequence[Claim]) -> list[Claim]:
    """Claims of different words, the first of each."""
    found: dict[tuple[str, ...], Claim] = {}
    for claim in claims:
        found.setdefault(tuple(word.form for word in words(claim.text)), claim)
    return list(found.values())


def most_telling(
    claims: Sequence[Claim], asked: Sequence[AskedPart], quoting: Quoting
) -> tuple[list[Claim], list[Claim]]:
    """Claims that answer a question best by its words, and the others; only in ``strict`` quoting.

    Those stay whose quotes hold as much of the question as the best one's, and those that hold
    words of it that no better one has.
    """
    if quoting != "strict" or len(claims) < 2:
        return list(claims), []
    shares = {
        id(claim): question_share(asked[claim.part], claim.question, claim.quote)
        for claim in claims
        if claim.quote is not None
    }
    ranked = sorted(claims, key=lambda claim: -shares.get(id(claim), 0.0))
    best, covered = shares.get(id(ranked[0]), 0.0), set[str]()
    kept, others = [], []
    for claim in ranked:
        wanted = {word.form for word in words(claim.question)}
        there = wanted & {word.form for word in words(claim.quote.text if claim.quote else "")}
        if shares.get(id(claim), 0.0) >= best - SAME or there - covered:
            kept.append(claim)
            covered |= there
        else:
            others.append(
                replace(claim, verdict="rejected", reason="Another passage answers it better.")
            )
    return kept, others


async def merge(
    calls: Calls, question: str, claims: Sequence[Claim], limits: MergeLimits
) -> Merged:
    """One answer to one question.

    Claims of the same words are one, and a single claim needs no call. A merged answer whose words
    are not those of its notes is dropped, and the notes stand for themselves.

    Args:
        calls: to make.
        question: that the claims answer.
        claims: of all parts.
        limits: when to stop.
    """
    merged = Merged(distinct(claims))
    while len(merged.claims) > 1:
        if merged.depth == limits.most_depth:
            merged.notes.append(
                f"After {merged.depth} merges {len(merged.claims)} partial answers are left, which "
                f"stand side by side."
            )
            break
        groups = grouped(merged.claims, limits)
        try:
            results = await all_of(_merge_group(calls, question, group) for group in groups)
        except BudgetError as error:
            merged.notes.append(f"{error} Partial answers stand side by side.")
            break
        merged.depth += 1
        merged.calls += sum(len(group) > 1 for group in groups)
        failed = sum(result is None for result in results)
        if failed:
            merged.notes.append(
                f"{failed} of {len(groups)} merged answers did not keep to their notes; the notes "
                f"stand side by side."
            )
            break
        fewer = distinct([claim for result in results for claim in result or []])
        if len(groups) == 1 or len(fewer) >= len(merged.claims):
            merged.claims = fewer
            break
        merged.claims = fewer
    return merged


def grouped(claims: Sequence[Claim], limits: MergeLimits) -> list[list[Claim]]:
    """Claims in order, as many together as one call holds."""
    groups: list[list[Claim]] = [[]]
    for claim in claims:
        length = sum(len(one.text) for one in groups[-1]) + len(claim.text)
        full = len(groups[-1]) == limits.fan_in or length > limits.most_characters
        if groups[-1] and full:
            groups.append([])
        groups[-1].append(claim)
    return groups


async def _merge_group(calls: Calls, question: str, group: Sequence[Claim]) -> list[Claim] | None:
    """Claims of a merged answer with the quotes of their notes; None: it says something else."""
    if len(group) == 1:
        return list(group)
    notes = [claim.text for claim in group]
    reply = await calls.plain(merge_prompt(question, notes), MERGED_TOKENS)
    if says_not_found(reply.text):
        return None
    starts, text = [], ""
    for note in notes:
        starts.append(len(text))
        text += note + "\n\n"
    index, found = PassageIndex(text), []
    for sentence in claims_of(reply):
        support = index.support(sentence)
        if support is None or not keeps_to(sentence, text):
            return None
        source = max(n for n, start in enumerate(starts) if start <= support.start)
        found.append(replace(group[source], text=sentence))
    return found or None


def keeps_to(sentence: str, notes: str) -> bool:
    """Whether a sentence says what notes say: all its numbers, and most of its longer words."""
    there = {word.form for word in words(notes)}
    said = {word.form: word for word in words(sentence)}.values()
    if any(word.is_number and word.form not in there for word in said):
        return False
    telling = [w.form for w in said if len(w.form) >= TELLING_LETTERS or not w.form.isascii()]
    return sum(form in there for form in telling) >= KEPT_SHARE * len(telling)
