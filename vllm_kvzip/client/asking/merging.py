"""Answers of parts become one answer, by the model where more than one is left.

Recursive Language Models (Zhang et al., arXiv 2512.24601) let a model call itself over parts of a
prompt that is too long for it. Here the tree of calls is fixed: parts, then groups of their
answers, until one call holds all that is left.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from vllm_kvzip.client.asking.drafting import claims_of, question_share
from vllm_kvzip.client.asking.prompts import merge_prompt
from vllm_kvzip.client.errors import BudgetError
from vllm_kvzip.client.text.words import words
from vllm_kvzip.client.together import all_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.client.asking.answers import Claim
    from vllm_kvzip.client.asking.budget import Calls
    from vllm_kvzip.client.asking.drafting import AskedPart, Quoting

SAME = 1e-6
MERGED_TOKENS = 192
KEPT_SHARE = 0.75  # of a merged clause's telling words that its note must hold
TELLING_LETTERS = 4  # of a word that tells something, if it is neither a name nor a number
LEFT_OUT = "The merged answer leaves it out."
_CLAUSE_END = re.compile(r"[,;:]\s+(?:and\s+)?|\s+and\s+")
_WEAKEST = ("unverified", "unquoted", "quoted", "revised", "confirmed")


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
        left_out: claims that merged answers do not repeat.
        calls: that merged.
        depth: merges behind each other.
        notes: what did not work, one sentence each.
    """

    claims: list[Claim]
    left_out: list[Claim] = field(default_factory=list)
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

    Claims of the same words are one, and a single claim needs no call. A merged answer that says
    what no note says is dropped, and the notes stand for themselves.

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
            results = await all_of(_merge_group(calls, question, g, merged) for g in groups)
        except BudgetError as error:
            merged.notes.append(f"{error} Partial answers stand side by side.")
            break
        merged.depth += 1
        failed = sum(result is None for result in results)
        if failed:
            merged.notes.append(
                f"{failed} of {len(groups)} merged answers did not keep to their notes; the notes "
                f"stand side by side."
            )
            break
        fewer = distinct([claim for result in results if result for claim in result.claims])
        merged.left_out += [claim for result in results if result for claim in result.left_out]
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


async def _merge_group(
    calls: Calls, question: str, group: Sequence[Claim], merged: Merged
) -> Merged | None:
    """What is left of some claims; None: the model says something else."""
    if len(group) == 1:
        return Merged(list(group))
    notes = [claim.text for claim in group]
    reply = await calls.plain(merge_prompt(question, notes), MERGED_TOKENS)
    merged.calls += 1
    found, used = [], set()
    for sentence in claims_of(reply):
        sources = sources_of(sentence, notes)
        if not sources:
            return None
        used |= set(sources)
        found.append(_made_of(sentence, [group[source] for source in sources]))
    if not found:
        return None
    unused = [claim for number, claim in enumerate(group) if number not in used]
    left_out = [replace(one, verdict="rejected", reason=LEFT_OUT) for one in unused]
    return Merged(found, left_out)


def sources_of(sentence: str, notes: Sequence[str]) -> list[int]:
    """Which notes say a sentence, by number; none: a clause of it is said by none.

    One note says all of it, or each clause is said by one: "Anna was born in 1902, and Boris in
    1910." A sentence whose clauses mix two notes has none.
    """
    whole = _source(sentence, notes)
    if whole is not None:
        return [whole]
    clauses = [clause for clause in _CLAUSE_END.split(sentence) if words(clause)]
    found = [_source(clause, notes) for clause in clauses]
    if len(clauses) < 2 or None in found:
        return []
    return list(dict.fromkeys(source for source in found if source is not None))


def _source(clause: str, notes: Sequence[str]) -> int | None:
    """Number of the first note that says a clause.

    It has all numbers of the clause and most of its telling words, and other notes have none of
    those that it lacks.
    """
    forms = [{word.form for word in words(note)} for note in notes]
    everywhere = set[str]().union(*forms)
    in_small = {w.form for note in notes for w in words(note) if note[w.start].islower()}
    telling, numbers = set(), set()
    for word in words(clause):
        is_name = clause[word.start].isupper() and word.form not in in_small
        if word.is_number:
            numbers.add(word.form)
        if (
            word.is_number
            or is_name
            or len(word.form) >= TELLING_LETTERS
            or not word.form.isascii()
        ):
            telling.add(word.form)
    for number, note in enumerate(forms):
        lacking = telling - note
        if numbers & lacking or lacking & everywhere:
            continue
        if len(lacking) <= (1 - KEPT_SHARE) * len(telling):
            return number
    return None


def _made_of(sentence: str, sources: Sequence[Claim]) -> Claim:
    """A merged sentence with the quotes of its notes, no better checked than the worst of them."""
    worst = min(sources, key=lambda claim: _WEAKEST.index(claim.verdict))
    quotes = [q for c in sources for q in (c.quote, *c.more_quotes) if q is not None]
    quotes = list(dict.fromkeys(quotes))
    return replace(
        worst,
        text=sentence,
        part=sources[0].part,
        quote=quotes[0] if quotes else None,
        more_quotes=tuple(quotes[1:]),
    )
