"""All questions about a document, asked and judged."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from reading.hidden_facts import is_right
from vllm_kvzip.client import Document, Reader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from reading.hidden_facts import AskedFacts, HiddenFacts
    from vllm_kvzip.client import Answer, Claim, ContextLibrary
    from vllm_kvzip.client.asking.drafting import Quoting

COMPUTED = 'source="local_compute"'


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
        unquoted = Reader(library, [reading], quoting="none")
        found |= _verdicts(_ask(unquoted, [*hidden.single, *hidden.absent], verify=True))
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


def _verdicts(answered: Sequence[tuple[AskedFacts, Answer]]) -> dict[str, str]:
    """What verification alone does with the drafts of all parts, none of them looked up."""
    counts: Counter[tuple[bool, str]] = Counter()
    for asked, answer in answered:
        for claim in [*answer.claims, *answer.rejected]:
            counts[_says(asked, claim.draft or claim.text), _fate(asked, claim)] += 1
    wrong = sum(count for (was_right, _), count in counts.items() if not was_right)
    right = sum(count for (was_right, _), count in counts.items() if was_right)
    removed = counts[False, "removed"] + counts[False, "set right"]
    return {
        "verification alone: wrong claims removed": f"{removed} / {wrong}",
        "verification alone: of these set right": str(counts[False, "set right"]),
        "verification alone: right claims removed": f"{counts[True, 'removed']} / {right}",
    }


def _says(asked: AskedFacts, text: str) -> bool:
    return bool(asked.codes) and all(code in text for code in asked.codes)


def _fate(asked: AskedFacts, claim: Claim) -> str:
    if claim.verdict == "rejected":
        return "removed"
    if claim.draft:
        return "set right" if _says(asked, claim.text) else "kept"
    return "kept"


def _computed(library: ContextLibrary) -> float:
    """Prompt tokens that the server has computed so far."""
    text = library.run(library.library.server.metrics_text())
    name = "vllm:prompt_tokens_by_source_total"
    return sum(
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith(name) and COMPUTED in line
    )
