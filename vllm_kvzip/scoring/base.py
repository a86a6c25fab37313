"""The scorer contract, and scorers by name.

A scorer answers one question: how important is each KV pair? It sees one layer at a time, so no
more than one layer's keys and values are ever unpacked. How many pairs a head may keep is not its
business (:mod:`vllm_kvzip.budgeting.budgets`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vllm_kvzip.registry import SCORERS

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.config import Budget
    from vllm_kvzip.layer_inputs import LayerInputs


@dataclass(frozen=True)
class ScorerSettings:
    """Settings every scorer gets.

    Attributes:
        observation_window_tokens: how many of the last prompt queries ``window`` looks at.
        surrogate: file of the trained networks, for scorers that want it.
        first_kv_head: of the model's KV heads the first one that this worker has, as ranks share
            them.
    """

    observation_window_tokens: int = 32
    surrogate: str | None = None
    first_kv_head: int = 0


class Scorer(ABC):
    """Scores the KV pairs of one layer; subclasses set ``name`` and write :meth:`score_layer`.

    Attributes:
        name: as in the configuration.
        needs_values: whether ``LayerInputs.values`` is wanted.
        needs_reconstruction: whether ``LayerInputs.reconstruction`` is wanted. The model then runs
            over the context a second time.
        needs_observation_queries: whether ``LayerInputs.observation_queries`` is wanted. Keeping
            queries costs memory during prefill, so scorers that do not need them say so.
        observes_rounds_only: whether it wants them in rounds only, and scores prompts and contexts
            without them.
        default_budget: the budget that suits its scores, whether or not the model has a profile;
            None leaves it to the engine: ``profile`` where there is one, else ``adaptive``.
        min_observation_tokens: how many of those queries are kept whatever the setting says.
        needs_rotary: whether ``LayerInputs.rotary`` is wanted.
        comparable_across_parts: whether scores of one part of a context can be compared with those
            of another part, as a prefill budget asks for.
        rescores_kept: whether it sees all candidates of a round at once: what earlier rounds kept,
            then what is new (``LayerInputs.positions`` and ``real``). So it need not be comparable
            across parts. In mode ``evict`` only; in the others a scorer that is comparable goes on
            from the scores of earlier rounds.
        needs_surrogate: whether ``ScorerSettings.surrogate`` is wanted.
        takes_capped_logits: whether it is right where a model caps its attention logits. A scorer
            that does not look at logits is.
    """

    name: ClassVar[str]
    needs_values: ClassVar[bool] = False
    needs_observation_queries: ClassVar[bool] = False
    observes_rounds_only: ClassVar[bool] = False
    needs_reconstruction: ClassVar[bool] = False
    min_observation_tokens: ClassVar[int] = 0
    needs_rotary: ClassVar[bool] = False
    needs_surrogate: ClassVar[bool] = False
    takes_capped_logits: ClassVar[bool] = True
    comparable_across_parts: ClassVar[bool] = False
    rescores_kept: ClassVar[bool] = False
    default_budget: ClassVar[Budget | None] = None

    def __init__(self, settings: ScorerSettings) -> None:
        self.settings = settings

    @abstractmethod
    def score_layer(self, inputs: LayerInputs) -> torch.Tensor:
        """Score every KV pair of one layer.

        Args:
            inputs: keys, values and what else is known; must not be modified.

        Returns:
            float32 ``[H, T]``, finite; higher means keep. With budget ``adaptive``, scores are
            compared over layers and heads, so they should mean the same everywhere.
        """


register_scorer = SCORERS.register
"""Make a scorer available under its name; usable as a class decorator."""


def available_scorers() -> tuple[str, ...]:
    """Names of all scorers, those of other packages included."""
    return SCORERS.names()


def scorer_class(name: str) -> type[Scorer]:
    """The scorer of that name.

    Raises:
        ValueError: if there is none; names the nearest one.
    """
    found: type[Scorer] = SCORERS.find(name)
    return found


def create_scorer(name: str, settings: ScorerSettings | None = None) -> Scorer:
    """A scorer by name.

    Raises:
        ValueError: if there is none of that name.
    """
    return scorer_class(name)(settings or ScorerSettings())
