"""Contexts and questions through one engine: which answers are right, and what is held meanwhile.

See ``eval_quality.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evaluation import BLOCK_SIZE, counter, start_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from evaluation import Counts
    from quality_tasks import Document
    from vllm import LLM, SamplingParams


@dataclass(frozen=True)
class Measured:
    """Answers over contexts that were compressed at one keep ratio.

    Attributes:
        counts: right tokens and all tokens of the answers about each document.
        held: bytes of the contexts' blocks after compression / before.
    """

    counts: Counts
    held: float


def measure(
    model: str,
    documents: Sequence[Document],
    settings: dict[str, Any] | None,
    ratios: Sequence[float],
    *,
    num_ranks: int = 1,
    dtype: str = "float32",
) -> list[Measured]:
    """Ask about each document at each keep ratio, one after another in one engine.

    Args:
        model: its folder.
        documents: contexts and questions.
        settings: the plugin's, with the highest of the ratios; None: without compression.
        ratios: of what ``settings`` count, KV pairs or bytes. Without compression one will do.
        num_ranks, dtype: see :func:`start_engine`.

    Raises:
        RuntimeError: if a question did not start from a compressed context, or a context was
            compressed more than once, so that nobody knows what is held.
    """
    llm = start_engine(model, settings, num_ranks, dtype)
    try:
        if settings is None:
            return [Measured(_ask(llm, documents, None), 1.0)]
        return [_compress_and_ask(llm, documents, ratio) for ratio in ratios]
    finally:
        llm.llm_engine.engine_core.shutdown()


def held_share(documents: Sequence[Document], num_freed: float) -> float:
    """Share of their bytes that contexts hold after so many of their blocks were freed."""
    return 1 - num_freed / sum(len(document.tokens) // BLOCK_SIZE for document in documents)


def right_tokens(documents: Sequence[Document], outputs: Sequence[Sequence[int]]) -> Counts:
    """Right and all answer tokens of each document, from the outputs of all its questions."""
    counts, rest = [], iter(outputs)
    for document in documents:
        right = total = 0
        for question in document.questions:
            answer = question.answer
            right += sum(a == b for a, b in zip(next(rest), answer, strict=True))
            total += len(answer)
        counts.append((right, total))
    return counts


def _compress_and_ask(llm: LLM, documents: Sequence[Document], ratio: float) -> Measured:
    names = ("prefix_hits_total", "requests_compressed_total", "blocks_freed_total")
    before = [counter(name) for name in names]
    prompts = [_prompt(ratio, number, each.tokens) for number, each in enumerate(documents)]
    limits = [_sampling(2, len(document.tokens), ratio) for document in documents]
    llm.generate(prompts, limits, use_tqdm=False)
    counts = _ask(llm, documents, ratio)
    hits, compressed, freed = (
        counter(name) - earlier for name, earlier in zip(names, before, strict=True)
    )
    if hits != sum(len(document.questions) for document in documents):
        raise RuntimeError(f"at {ratio:g} not every question started from a compressed context")
    if compressed != len(documents):
        raise RuntimeError(f"at {ratio:g} {compressed:g} of {len(documents)} were compressed")
    return Measured(counts, held_share(documents, freed))


def _ask(llm: LLM, documents: Sequence[Document], ratio: float | None) -> Counts:
    prompts, limits = [], []
    for number, document in enumerate(documents):
        for question in document.questions:
            prompts.append(_prompt(ratio, number, [*document.tokens, *question.tokens]))
            limits.append(_sampling(len(question.answer), len(document.tokens), ratio))
    results = llm.generate(prompts, limits, use_tqdm=False)
    return right_tokens(documents, [result.outputs[0].token_ids for result in results])


def _sampling(num_tokens: int, context: int, ratio: float | None) -> SamplingParams:
    from vllm import SamplingParams

    options = {"kvzip_context_tokens": context}
    return SamplingParams(
        temperature=0,
        max_tokens=num_tokens,
        ignore_eos=True,
        extra_args=options if ratio is None else {**options, "kvzip_keep_ratio": ratio},
    )


def _prompt(ratio: float | None, number: int, tokens: list[int]) -> dict[str, Any]:
    """A prompt that shares nothing with another context, or with the same one at another ratio.

    Contexts that differ in their last words only would share raw blocks, and a scorer that watches
    the last queries would not see them.
    """
    return {"prompt_token_ids": tokens, "cache_salt": f"{number} at {ratio}"}
