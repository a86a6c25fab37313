"""Contexts and questions through engines: what compression costs a model's answers.

    run = QualityRun(model, documents)
    run.uncompressed()
    (found,) = run.compressed({"keep_ratio": 0.5, "min_prompt_tokens": 0}, [0.5])
    found.lost_nats(run.full).mean        # nats a token of the answers

Each context is sent alone and compressed, then its questions start from its compressed prefix; a
run fails unless each did. A question is asked three times:

1. The model answers by itself, greedily: is the answer right?
2. It is led through the reference answer: how likely does it find each token?
3. It is led through what the uncompressed model says: how far are its distributions of the next
   token from the uncompressed model's?

Leading needs one rank (see ``teacher_forcing.py``); with more, only the first is asked.
"""

from __future__ import annotations

import gc
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from vllm_kvzip.config import METHOD
from vllm_kvzip.evaluation.engines import BLOCK_SIZE, counter, start_engine
from vllm_kvzip.evaluation.quality.lessons import Lesson
from vllm_kvzip.evaluation.quality.metrics import Answers, Measured
from vllm_kvzip.planning.request_options import KEEP_RATIO

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm_kvzip.evaluation.tasks.documents import Document
    from vllm_kvzip.vllm_bridge.symbols import LLM, SamplingParams

CONTINUATION_TOKENS = 24
POOL_SHARE = 0.45  # of the KV cache for contexts and questions of one group; rounds of both fit
TURNS = 3  # how often a question is asked


class QualityRun:
    """The same documents through engines with different settings.

    Args:
        model: its folder.
        documents: contexts and questions.
        dtype: of the model and its KV cache.
        num_ranks: tensor-parallel processes.
        continuation_tokens: of the uncompressed model's own continuation, at most.

    Attributes:
        full: what was found without compression.
    """

    def __init__(
        self,
        model: str,
        documents: Sequence[Document],
        *,
        dtype: str = "float32",
        num_ranks: int = 1,
        continuation_tokens: int = CONTINUATION_TOKENS,
    ) -> None:
        self.full = Measured()
        self._model, self._documents = model, documents
        self._dtype, self._num_ranks = dtype, num_ranks
        self._is_led = num_ranks == 1
        self._continuation_tokens = continuation_tokens
        self._option = KEEP_RATIO
        self._continuations: dict[tuple[int, int], Lesson] = {}  # by document and question

    def uncompressed(self) -> Measured:
        """Without compression; what the others are compared with."""
        with self._engine(None) as llm:
            self.full = self._ask_all(llm, None)
        return self.full

    def compressed(
        self, settings: dict[str, Any], asked: Sequence[float], option: str = KEEP_RATIO
    ) -> list[Measured]:
        """At each keep ratio, one after another in one engine; after :meth:`uncompressed`.

        Args:
            settings: the plugin's, with the highest of the ratios.
            asked: keep ratios of what ``settings`` count, KV pairs or bytes; or quality losses.
            option: by which a request asks for one of them.

        Raises:
            RuntimeError: if a question did not start from a compressed context, or a context was
                not compressed exactly once, so that nobody knows what is held.
        """
        self._option = option
        with self._engine(settings) as llm:
            return [self._ask_all(llm, value) for value in asked]

    @contextmanager
    def _engine(self, settings: dict[str, Any] | None) -> Iterator[LLM]:
        longest = max(
            len(document.tokens) + len(question.tokens) + len(question.answer)
            for document in self._documents
            for question in document.questions
        )
        more: dict[str, Any] = {"max_model_len": longest + self._continuation_tokens + 2}
        if self._is_led:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # which is what lessons are written for
            from vllm_kvzip.evaluation.quality.teacher_forcing import TeacherForcing

            more["logits_processors"] = [TeacherForcing]
            more["async_scheduling"] = False  # a lesson must know which token comes next
        llm = start_engine(self._model, settings, self._num_ranks, self._dtype, **more)
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()

    def _ask_all(self, llm: LLM, ratio: float | None) -> Measured:
        names = ("prefix_hits_total", "requests_compressed_total", "blocks_freed_total")
        before = [counter(name) for name in names]
        found, num_asked = Measured(), 0
        num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        for group in groups_that_fit(self._documents, num_blocks, self._continuation_tokens):
            contexts = [(number, list[int](), Lesson(length=2)) for number in group]
            for result in self._generate(llm, contexts, ratio):
                if ratio is not None:
                    found.tell((result.kv_transfer_params or {}).get(METHOD, {}))
            answers = {number: self._ask(number, ratio) for number in group}
            turns = [
                (number, question.tokens, lesson)
                for number, each in answers.items()
                for question, found_of in zip(self._documents[number].questions, each, strict=True)
                for lesson in found_of.lessons
            ]
            self._generate(llm, turns, ratio)
            num_asked += len(turns)
            for number, each in answers.items():
                found.add(self._documents[number], each)
        if ratio is None:
            return found
        hits, compressed, freed = (
            counter(name) - earlier for name, earlier in zip(names, before, strict=True)
        )
        if hits != num_asked:
            raise RuntimeError(f"at {ratio:g} not every question started from a compressed context")
        if compressed != len(self._documents):
            raise RuntimeError(
                f"at {ratio:g} {compressed:g} of {len(self._documents)} were compressed"
            )
        found.held = held_share(self._documents, freed)
        return found

    def _ask(self, number: int, ratio: float | None) -> list[Answers]:
        """What is to be recorded of each question about one document."""
        answers = []
        for which, question in enumerate(self._documents[number].questions):
            asked = Answers()
            if question.answer:
                asked.greedy = Lesson(length=len(question.answer))
            if question.answer and self._is_led:
                asked.forced = Lesson(question.answer)
            if self._is_led:
                asked.continued = self._continuation(number, which, ratio)
            answers.append(asked)
        return answers

    def _continuation(self, number: int, which: int, ratio: float | None) -> Lesson:
        """The uncompressed model's own answer, or a lesson that leads through it."""
        if ratio is None:
            own = Lesson(length=self._continuation_tokens, may_end=True, keeps_distributions=True)
            self._continuations[number, which] = own
            return own
        own = self._continuations[number, which]
        return Lesson(own.output, reference=own.distributions)

    def _generate(
        self, llm: LLM, turns: Sequence[tuple[int, list[int], Lesson]], ratio: float | None
    ) -> list[Any]:
        """Send requests at once: number of a document, what follows its context, and the lesson.

        Returns:
            vLLM's results.
        """
        prompts, limits = [], []
        for number, tokens, lesson in turns:
            context = self._documents[number].tokens
            prompts.append(_prompt(ratio, number, [*context, *tokens]))
            limits.append(self._sampling(lesson, len(context), ratio))
        results = llm.generate(prompts, limits, use_tqdm=False)
        for (_, _, lesson), result in zip(turns, results, strict=True):
            lesson.output = list(result.outputs[0].token_ids)
        if self._is_led:
            from vllm_kvzip.evaluation.quality.teacher_forcing import forget

            forget()
        return list(results)

    def _sampling(self, lesson: Lesson, context: int, ratio: float | None) -> SamplingParams:
        from vllm_kvzip.vllm_bridge.symbols import SamplingParams

        options: dict[str, Any] = {"kvzip_context_tokens": context}
        if ratio is not None:
            options[self._option] = ratio
        if self._is_led:
            from vllm_kvzip.evaluation.quality.teacher_forcing import give

            options |= give(lesson)
        return SamplingParams(
            temperature=0,
            max_tokens=lesson.length if lesson.tokens is None else len(lesson.tokens),
            ignore_eos=not lesson.may_end,
            extra_args=options,
        )


def groups_that_fit(
    documents: Sequence[Document], num_blocks: int, continuation_tokens: int
) -> list[list[int]]:
    """Numbers of documents whose contexts and questions are in the KV cache at once.

    Args:
        documents: in order; one that does not fit is a group of its own.
        num_blocks: of the KV cache.
        continuation_tokens: of each question.
    """
    groups: list[list[int]] = []
    room = 0.0
    for number, document in enumerate(documents):
        needed = -(-len(document.tokens) // BLOCK_SIZE)
        for question in document.questions:
            longest = len(question.tokens) + max(len(question.answer), continuation_tokens)
            needed += TURNS * (longest // BLOCK_SIZE + 2)  # also the context's last, partial block
        if not groups or needed > room:
            groups.append([])
            room = POOL_SHARE * num_blocks
        groups[-1].append(number)
        room -= needed
    return groups


def held_share(documents: Sequence[Document], num_freed: float) -> float:
    """Share of their bytes that contexts hold after so many of their blocks were freed."""
    return 1 - num_freed / sum(len(document.tokens) // BLOCK_SIZE for document in documents)


def _prompt(ratio: float | None, number: int, tokens: list[int]) -> dict[str, Any]:
    """A prompt that shares nothing with another context, or with the same one at another ratio.

    Contexts that differ in their last words only would share raw blocks, and a scorer that watches
    the last queries would not see them.
    """
    return {"prompt_token_ids": tokens, "cache_salt": f"{number} at {ratio}"}
