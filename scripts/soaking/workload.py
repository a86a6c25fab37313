"""What the clients of a soak want, and when; both follow from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

OWN_RATIOS = [0.15, 0.25, 0.7, 0.95, 1.0, 1.0]
MAX_TOKENS = [1, 4, 40, 150, 150]
PRIORITIES = 4
NAME = "soak_request"


@dataclass
class Asked:
    """One request.

    Attributes:
        prompt: token ids.
        max_tokens: length of the answer; the end-of-sequence token is ignored.
        options: its ``kvzip*`` options.
        num_samples: how many answers it wants.
        greedy: whether they follow from the prompt alone.
        priority: the smaller, the sooner, with scheduling policy ``priority``.
    """

    prompt: list[int]
    max_tokens: int
    options: dict[str, Any]
    num_samples: int
    greedy: bool
    priority: int

    @property
    def opted_out(self) -> bool:
        """Whether it must be answered as if there were no compression."""
        return self.options.get("kvzip") == "off"

    def params(self, name: str) -> Any:
        """Its ``SamplingParams``, by which the scheduler's requests tell whose samples they are."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # vLLM refuses several samples at temperature 0; the best one of one is the same.
        one_by_one = {"temperature": 1.0, "top_k": 1 if self.greedy else 0}
        return SamplingParams(
            **(one_by_one if self.num_samples > 1 else {"temperature": 0.0}),
            max_tokens=self.max_tokens,
            n=self.num_samples,
            ignore_eos=True,
            detokenize=False,
            extra_args={**self.options, NAME: name},
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


@dataclass
class Workload:
    """The clients, and those who run the engine.

    Args:
        seed: of everything they do.
        num_requests: how many requests there are.
        vocabulary: token ids are below it.
        max_model_len: of prompt and answer.
        all_greedy: whether every answer shall follow from its prompt.

    Attributes:
        requests: all of them, in the order in which they come.
        moments: decides what happens between two steps.
    """

    seed: int
    num_requests: int
    vocabulary: int
    max_model_len: int
    all_greedy: bool = False
    requests: list[Asked] = field(init=False)
    moments: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.moments = random.Random(self.seed)
        self._random = random.Random(self.seed + 1_000_000)
        self._documents = [self._tokens(length) for length in (288, 320, 352, 416)]
        self.requests = [self._next_request() for _ in range(self.num_requests)]

    def burst(self) -> int:
        """How many requests arrive before the next step."""
        chance = self.moments.random()
        return 0 if chance < 0.7 else 1 if chance < 0.9 else self.moments.randint(4, 12)

    def happens(self, chance: float) -> bool:
        """Whether something happens before the next step that seldom does."""
        return self.moments.random() < chance

    def _next_request(self) -> Asked:
        options: dict[str, Any] = {}
        document: list[int] = []
        kind, rest = self._random.random(), self._random.randint(1, 60)
        if kind < 0.35:
            document = self._random.choice(self._documents)
            if self._random.random() < 0.6:
                options["kvzip_context_tokens"] = len(document) - self._random.choice([0, 0, 40])
        elif kind < 0.45:
            rest = self._random.randint(250, self.max_model_len - 100)
        elif kind < 0.55:
            rest = self._random.randint(60, 250)
        prompt = [*document, *self._tokens(rest)]
        if self._random.random() < 0.35:
            options["kvzip_keep_ratio"] = self._random.choice(OWN_RATIOS)
        if opted_out := self._random.random() < 0.2:
            options["kvzip"] = "off"
        several = self._random.random() < 0.15
        return Asked(
            prompt,
            min(self.max_model_len - len(prompt), self._random.choice(MAX_TOKENS)),
            options,
            num_samples=self._random.choice([2, 3]) if several else 1,
            greedy=not several or opted_out or self.all_greedy or self._random.random() < 0.5,
            priority=self._random.randrange(PRIORITIES),
        )

    def _tokens(self, count: int) -> list[int]:
        return [self._random.randrange(3, self.vocabulary) for _ in range(count)]
