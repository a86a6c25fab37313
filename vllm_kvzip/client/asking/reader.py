"""Questions about documents that a library has read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.client.asking.answers import NOT_IN_DOCUMENT, Answer
from vllm_kvzip.client.asking.budget import Calls
from vllm_kvzip.client.asking.drafting import NO_CALL, AskedPart, draft
from vllm_kvzip.client.asking.merging import MergeLimits, merge, most_telling
from vllm_kvzip.client.asking.prompts import answer_prompt, split_question
from vllm_kvzip.client.asking.verification import verify
from vllm_kvzip.client.errors import BudgetError, QuestionError
from vllm_kvzip.client.statistics import Tally
from vllm_kvzip.client.together import all_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.client.asking.answers import Claim
    from vllm_kvzip.client.asking.drafting import Quoting
    from vllm_kvzip.client.library import AsyncContextLibrary, Reading

CLOSING_TOKENS = 32  # of a chat template, between question and answer


class AsyncReader:
    """Asks all parts of some documents at once, and merges what they say.

    Args:
        library: that read them.
        readings: the documents.
        quoting: how claims are looked up in the document; see :data:`.drafting.Quoting`.
        answer_tokens: of a part's answer, at most.
        most_calls: of one question.
        merge_limits: when merging of partial answers ends.
        revisions: how often verification may put another sentence in a claim's place.
    """

    def __init__(
        self,
        library: AsyncContextLibrary,
        readings: Sequence[Reading],
        *,
        quoting: Quoting = "asked",
        answer_tokens: int = 64,
        most_calls: int = 500,
        merge_limits: MergeLimits | None = None,
        revisions: int = 2,
    ) -> None:
        self._library = library
        self._readings = list(readings)
        self._quoting = quoting
        self._answer_tokens = answer_tokens
        self._most_calls = most_calls
        self._merge_limits = merge_limits or MergeLimits()
        self._revisions = revisions
        parts = [part for reading in self._readings for part in reading.parts]
        self._parts = [AskedPart(number, part) for number, part in enumerate(parts)]

    async def ask(self, question: str, *, verify: bool = False) -> Answer:
        """Answer a question; cancelling it ends its calls on the server too.

        Several questions in one are asked one by one. With a single part, one call answers each.

        Args:
            question: about the documents.
            verify: whether each claim is checked, and revised where the document says otherwise.

        Raises:
            QuestionError: if it is empty or too long.
            BudgetError: if asking each part once takes more calls than there may be.
            ServerError: if the server refuses, or is gone.
        """
        questions = split_question(question)
        await self._check(questions)
        server = self._library.server
        tally = await Tally.start(server)
        tally.parts_read_again = await self._library.refresh(self._readings)
        num_drafts = len(questions) * len(self._parts)
        calls = Calls(server, tally, self._most_calls, num_drafts)
        drafts = await all_of(
            draft(calls, part, one, self._quoting, self._answer_tokens)
            for one in questions
            for part in self._parts
        )
        claims = [claim for claims in drafts for claim in claims]
        if verify:
            claims = await self._verified(calls, claims)
        answer, notes, rejected, merges, depth = [], [], [], 0, 0
        for one in questions:
            good = [c for c in claims if c.question == one and c.verdict != "rejected"]
            rejected += [c for c in claims if c.question == one and c.verdict == "rejected"]
            good, others = most_telling(good, self._parts, self._quoting)
            rejected += others
            merged = await merge(calls, one, good, self._merge_limits)
            answer += merged.claims
            rejected += merged.left_out
            notes += merged.notes
            merges, depth = merges + merged.calls, max(depth, merged.depth)
            if not good and len(questions) > 1:
                notes.append(f"{NOT_IN_DOCUMENT}: {one}")
        notes += self._other_notes(claims, tally)
        text = " ".join(dict.fromkeys(claim.text for claim in answer)) or NOT_IN_DOCUMENT
        return Answer(
            question, text, bool(answer), answer, rejected, merges, depth, notes,
            await tally.statistics([asked.part for asked in self._parts]),
        )  # fmt: skip

    async def _verified(self, calls: Calls, claims: Sequence[Claim]) -> list[Claim]:
        return await all_of(
            verify(calls, self._parts[claim.part], claim, self._quoting, self._revisions)
            for claim in claims
        )

    def _other_notes(self, claims: Sequence[Claim], tally: Tally) -> list[str]:
        notes = []
        unasked = sum(claim.reason == NO_CALL for claim in claims)
        if unasked:
            notes.append(f"{unasked} claims were rejected because no call was left to quote them.")
        thinking = sum(reply.is_thinking for reply in tally.replies)
        if thinking:
            notes.append(
                f"{thinking} calls ended before the model had said anything but its reasoning; "
                f"raise answer_tokens, or switch its reasoning off."
            )
        unverified = sum(claim.verdict == "unverified" for claim in claims)
        if unverified:
            notes.append(f"{unverified} claims could not be verified.")
        alone = [asked.part for asked in self._parts if asked.part.left_alone]
        if alone:
            notes.append(f"{len(alone)} parts are not compressed: {alone[0].left_alone}")
        return notes

    async def _check(self, questions: Sequence[str]) -> None:
        if not questions:
            raise QuestionError("The question is empty.")
        if not self._parts:
            raise QuestionError("There is no document to ask about.")
        needed = len(questions) * len(self._parts)
        if needed > self._most_calls:
            raise BudgetError(
                f"{len(questions)} questions to {len(self._parts)} parts take {needed} calls, more "
                f"than the budget of {self._most_calls}; raise it, or make parts larger."
            )
        facts = await self._library.server.facts()
        longest = max(asked.part.part.tokens for asked in self._parts)
        room = facts.max_model_len - facts.head_tokens - longest
        room -= self._answer_tokens + CLOSING_TOKENS
        for question in questions:
            tokens = await self._library.server.count_tokens(answer_prompt(question))
            if tokens > room:
                raise QuestionError(
                    f"The question takes {tokens} tokens, more than the {room} that are left "
                    f"beside a part; shorten it, or make parts smaller."
                )
