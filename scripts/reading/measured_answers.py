"""All questions about a document, asked and judged."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from reading.hidden_facts import is_right
from vllm_kvzip.client import Document, Reader
from vllm_kvzip.client.asking.budget import Calls
from vllm_kvzip.client.asking.drafting import AskedPart, draft, look_up
from vllm_kvzip.client.asking.verification import verify
from vllm_kvzip.client.statistics import Tally
from vllm_kvzip.client.together import all_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reading.hidden_facts import AskedFacts, HiddenFacts
    from vllm_kvzip.client import Answer, ContextLibrary
    from vllm_kvzip.client.asking.drafting import Quoting
    from vllm_kvzip.client.library import Reading

COMPUTED = 'source="local_compute"'
ANSWER_TOKENS, REVISIONS, UNBOUNDED = 64, 2, 10**9


def measure(
    library: ContextLibrary, hidden: HiddenFacts, *, quoting: Quoting, verifies: bool
) -> dict[str, Any]:
    """Figures by what they are, for a table.

    Args:
        library: that has read nothing yet.
        hidden: document and questions.
        quoting: of the reader.
        verifies: whether verification is measured too.
    """
    begin, computed = time.perf_counter(), _computed(library)
    reading = library.read(Document("document", hidden.text))
    read_seconds = time.perf_counter() - begin
    reader = Reader(library, [reading], quoting=quoting)
    first, second = hidden.single[0].text, hidden.single[1 % len(hidden.single)].text
    reader.ask(first)
    first_tokens, first_seconds = _computed(library) - computed, time.perf_counter() - begin
    begin, computed = time.perf_counter(), _computed(library)
    reader.ask(second)
    second_tokens, second_seconds = _computed(library) - computed, time.perf_counter() - begin
    found: dict[str, Any] = {
        "parts": str(len(reading.parts)),
        "tokens of the document": sum(part.part.tokens for part in reading.parts),
        "seconds to read it": read_seconds,
        "prompt tokens computed: reading and first question": first_tokens,
        "prompt tokens computed: second question": second_tokens,
        "second question / first, tokens": second_tokens / first_tokens,
        "second question / first, seconds": second_seconds / first_seconds,
        "KV blocks held / before": f"{sum(p.blocks_held for p in reading.parts)} / "
        f"{sum(p.blocks_before for p in reading.parts)}",
    }
    plain = _round(reader, hidden, verify=False)
    found |= plain.figures("")
    if verifies:
        found |= _round(reader, hidden, verify=True).figures("verified: ")
        asked = [*hidden.single, *hidden.absent]
        found |= library.run(_judged(library, reading, asked))
    return found


class _Round:
    """Answers to all questions.

    Args:
        hidden: the questions.
        single, absent, pairs: answers to them.
        seconds: that it took.
    """

    def __init__(
        self,
        hidden: HiddenFacts,
        single: list[Answer],
        absent: list[Answer],
        pairs: list[Answer],
        seconds: float,
    ) -> None:
        self._hidden = hidden
        self._single, self._absent, self._pairs = single, absent, pairs
        self._seconds = seconds

    def figures(self, prefix: str) -> dict[str, Any]:
        """For a table."""
        hidden, answers = self._hidden, [*self._single, *self._absent, *self._pairs]
        totals = [answer.statistics for answer in answers]
        calls = sum(one.calls for one in totals)
        prompts = sum(one.prompt_tokens for one in totals)
        figures = {
            "right, of hidden facts": _share(hidden.single, self._single),
            "said, and wrong": f"{_wrong(hidden.single, self._single)} / {len(self._single)}",
            "right, of pairs": _share(hidden.pairs, self._pairs),
            "false positives, of absent facts": f"{sum(a.found for a in self._absent)} / "
            f"{len(self._absent)}",
            "calls a question": calls / len(answers),
            "prompt tokens a question": prompts / len(answers),
            "of which computed": sum(one.read_tokens or 0 for one in totals) / len(answers),
            "parts read again": str(sum(one.parts_read_again for one in totals)),
            "seconds, all questions at once": self._seconds,
        }
        return {prefix + name: value for name, value in figures.items()}


def _round(reader: Reader, hidden: HiddenFacts, verify: bool) -> _Round:
    begin = time.perf_counter()
    asked = [*hidden.single, *hidden.absent, *hidden.pairs]
    answers = [answer for _, answer in _ask(reader, asked, verify)]
    seconds = time.perf_counter() - begin
    ends = len(hidden.single), len(hidden.single) + len(hidden.absent)
    return _Round(
        hidden, answers[: ends[0]], answers[ends[0] : ends[1]], answers[ends[1] :], seconds
    )


def _ask(
    reader: Reader, asked: Sequence[AskedFacts], verify: bool
) -> list[tuple[AskedFacts, Answer]]:
    answers = reader.ask_all([one.text for one in asked], verify=verify)
    return list(zip(asked, answers, strict=True))


def _share(asked: Sequence[AskedFacts], answers: Sequence[Answer]) -> str:
    right = sum(
        is_right(one.codes, answer.text, answer.found)
        for one, answer in zip(asked, answers, strict=True)
    )
    return f"{right} / {len(asked)}"


def _wrong(asked: Sequence[AskedFacts], answers: Sequence[Answer]) -> int:
    return sum(
        answer.found and not is_right(one.codes, answer.text, True)
        for one, answer in zip(asked, answers, strict=True)
    )


async def _judged(
    library: ContextLibrary, reading: Reading, asked: Sequence[AskedFacts]
) -> dict[str, str]:
    """What looking claims up, and verification alone, each do with the drafts of all parts."""
    server = library.library.server
    calls = Calls(server, await Tally.start(server), UNBOUNDED)
    parts = [AskedPart(number, part) for number, part in enumerate(reading.parts)]

    async def judge(one: AskedFacts, part: AskedPart) -> list[tuple[bool, bool, bool, bool]]:
        """For each claim: is it right; do both ways keep it; is it right after verification."""
        judged = []
        for claim in await draft(calls, part, one.text, "none", ANSWER_TOKENS):
            is_quoted = look_up(part, one.text, claim.text, "strict").verdict == "quoted"
            checked = await verify(calls, part, claim, "none", REVISIONS)
            is_kept = checked.verdict != "rejected" and not checked.draft
            is_set_right = bool(checked.draft) and _says(one, checked.text)
            judged.append((_says(one, claim.text), is_quoted, is_kept, is_set_right))
        return judged

    found = await all_of(judge(one, part) for one in asked for part in parts)
    claims = [claim for claims in found for claim in claims]
    right, wrong = [c for c in claims if c[0]], [c for c in claims if not c[0]]
    return {
        "drafts, wrong claims removed: looked up": _removed(wrong, 1),
        "drafts, wrong claims removed: verified only": _removed(wrong, 2),
        "drafts, of these set right": str(sum(claim[3] for claim in wrong)),
        "drafts, right claims removed: looked up": _removed(right, 1),
        "drafts, right claims removed: verified only": _removed(right, 2),
    }


def _removed(claims: Sequence[tuple[bool, ...]], way: int) -> str:
    return f"{sum(not claim[way] for claim in claims)} / {len(claims)}"


def _says(asked: AskedFacts, text: str) -> bool:
    return bool(asked.codes) and all(code in text for code in asked.codes)


def _computed(library: ContextLibrary) -> float:
    """Prompt tokens that the server has computed so far."""
    text = library.run(library.library.server.metrics_text())
    name = "vllm:prompt_tokens_by_source_total"
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(name) and COMPUTED in line
    )
