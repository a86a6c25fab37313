"""Measure what dropping KV pairs costs a model, so that a loss can be promised instead of a ratio.

Contexts of several lengths, which no network has learned from, are compressed at many keep ratios,
page by page as an engine does it. Behind each context the model answers some questions in its own
words; along these words the distance of its next-token distributions from those without compression
is measured, in nats a token. What was dropped has a worth (``budgeting/quality.py``). Worths and
losses together give the curve.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any

import torch

from vllm_kvzip.budgeting.budgets import allocate_adaptive
from vllm_kvzip.budgeting.quality import LossCurve, worth_of_dropped
from vllm_kvzip.budgeting.selection import rank, take
from vllm_kvzip.config import KVzipConfig
from vllm_kvzip.errors import ProfileError
from vllm_kvzip.evaluation.intervals import rank_correlation
from vllm_kvzip.evaluation.quality.lessons import divergence
from vllm_kvzip.evaluation.tasks.text_frame import TextFrame
from vllm_kvzip.evaluation.tasks.text_tasks import OPEN_QUESTIONS
from vllm_kvzip.head_profiles.head_profile import QualityCurve
from vllm_kvzip.head_profiles.network_training import predict
from vllm_kvzip.head_profiles.networks import MIN_LOG_SCORE
from vllm_kvzip.planning.tiers import pages_for
from vllm_kvzip.profiling.context_cache import copy_of, layers_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from vllm_kvzip.head_profiles.networks import LayerSurrogate
    from vllm_kvzip.model.rotary import RotaryTables
    from vllm_kvzip.profiling.masked_model import MaskedModel

DEFAULTS = KVzipConfig()
POWERS = (0.5, 1.0, 2.0)  # of the scores; the one that foretells new contexts best is taken
KEEP_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7)
PAGE_TOKENS = 32
LENGTHS = (1.0, 0.5, 2.0)  # of contexts, in turns, times the length that was asked for
QUESTIONS_A_CONTEXT = 3
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Probe:
    """What is asked behind a context.

    Attributes:
        tokens: the question.
        num_answer_tokens: of the model's own answer.
    """

    tokens: list[int]
    num_answer_tokens: int = ANSWER_TOKENS


@dataclass(frozen=True)
class Measured:
    """One context at one keep ratio.

    Attributes:
        context: number of the context.
        worths: of what was dropped, for each of ``POWERS``.
        nats: distance from the model without compression, nats a token.
    """

    context: int
    worths: tuple[float, ...]
    nats: float


def open_probes(tokenizer: Any, number: int) -> list[Probe]:
    """Questions about any text, others for the next context.

    Args:
        tokenizer: of the model.
        number: of the context.
    """
    frame = TextFrame.of(tokenizer)
    first = number * QUESTIONS_A_CONTEXT
    chosen = [OPEN_QUESTIONS[(first + i) % len(OPEN_QUESTIONS)] for i in range(QUESTIONS_A_CONTEXT)]
    return [Probe(frame.question(question).tokens) for question in chosen]


@torch.inference_mode()
def measure_losses(
    model: MaskedModel,
    networks: Sequence[LayerSurrogate],
    rotary: RotaryTables | None,
    contexts: Sequence[tuple[list[int], list[Probe]]],
    progress: Callable[[], Any] = lambda: None,
) -> list[Measured]:
    """Losses of all contexts at all keep ratios.

    Args:
        model: answers.
        networks: of scorer ``surrogate``, which chooses.
        rotary: of the model.
        contexts: token ids and what is asked behind them.
        progress: called after each context.
    """
    found = []
    for number, (tokens, probes) in enumerate(contexts):
        context = tokens[: len(tokens) // PAGE_TOKENS * PAGE_TOKENS]
        cache = model.read(context)
        log_scores = predict(networks, layers_of(cache, model.scored), rotary)
        scores = log_scores.clamp_(MIN_LOG_SCORE, 0.0).exp_()
        answers = [_answer(model, cache, len(context), probe) for probe in probes]
        for worths, kept in _kept(scores):
            distances = torch.cat(
                [
                    _distances(model, cache, kept, probe, answer, expected)
                    for probe, (answer, expected) in zip(probes, answers, strict=True)
                ]
            )
            found.append(Measured(number, worths, max(float(distances.mean()), 1e-9)))
        progress()
    return found


def loss_curve(found: Sequence[Measured]) -> QualityCurve:
    """The curve through what was measured, and how well it ranks contexts it does not know.

    Raises:
        ProfileError: if losses do not rise with what is dropped.
    """
    try:
        curves = [_curve_of(found, place) for place in range(len(POWERS))]
    except ValueError as error:
        raise ProfileError(f"There is no loss curve for this model: {error}.") from error
    _, correlation, curve = min(curves, key=lambda found: found[0])
    return QualityCurve(
        power=curve.power,
        points=[(float(f"{worth:.4g}"), float(f"{nats:.4g}")) for worth, nats in curve.points],
        num_contexts=len({one.context for one in found}),
        rank_correlation=round(correlation, 3),
    )


def _curve_of(found: Sequence[Measured], place: int) -> tuple[float, float, LossCurve]:
    """The curve of one power; before it how well curves without a context foretell its losses.

    Returns:
        mean squared error of the logarithms, rank correlation, and the curve.
    """
    pairs = [(one.worths[place], one.nats) for one in found]
    estimates = []
    for number in range(max(one.context for one in found) + 1):
        others = [p for p, one in zip(pairs, found, strict=True) if one.context != number]
        curve = LossCurve.through(POWERS[place], others)
        own = [one for one in found if one.context == number]
        estimates += [curve.nats(one.worths[place]) for one in own]
    measured = [one.nats for one in found]
    error = sum(log(a / b) ** 2 for a, b in zip(estimates, measured, strict=True)) / len(found)
    correlation = rank_correlation(estimates, measured)
    return error, correlation, LossCurve.through(POWERS[place], pairs)


def _kept(scores: torch.Tensor) -> list[tuple[tuple[float, ...], torch.Tensor]]:
    """For each keep ratio the worths of what is dropped, and what is kept, bool ``[L, H, T]``."""
    num_layers, num_heads, num_tokens = scores.shape
    least = pages_for(DEFAULTS.sink_tokens + DEFAULTS.recent_tokens, PAGE_TOKENS)
    ranking = rank(scores, DEFAULTS.sink_tokens, DEFAULTS.recent_tokens)
    worths = [worth_of_dropped(ranking.scores, PAGE_TOKENS, least, power) for power in POWERS]
    found = []
    for ratio in KEEP_RATIOS:
        blocks = round(ratio * num_tokens / PAGE_TOKENS)
        if blocks < least:
            continue
        total = blocks * num_layers * num_heads
        pages = allocate_adaptive(ranking.scores, total, PAGE_TOKENS, least)
        plan = take(ranking, torch.zeros_like(pages), pages, PAGE_TOKENS, total)
        heads = torch.arange(pages.numel()).repeat_interleave(pages.flatten())
        kept = torch.zeros(pages.numel(), num_tokens, dtype=torch.bool)
        kept[heads[:, None].expand_as(plan.positions), plan.positions] = True
        found.append((tuple(float(each[total]) for each in worths), kept.view(scores.shape)))
    return found


def _answer(
    model: MaskedModel, cache: Any, num_tokens: int, probe: Probe
) -> tuple[list[int], torch.Tensor]:
    """The model's own answer, and the log-probabilities ``[n, V]`` that it was chosen from."""
    seen = copy_of(cache, model.scored, slice(num_tokens), 1)
    inputs, answer, found = torch.tensor([probe.tokens]), [], []
    for _ in range(probe.num_answer_tokens):
        logits = model.logits(inputs, seen, None, 1)[0, -1]
        found.append(logits.log_softmax(dim=-1))
        answer.append(int(logits.argmax()))
        inputs = torch.tensor([answer[-1:]])
    return answer, torch.stack(found)


def _distances(
    model: MaskedModel,
    cache: Any,
    kept: torch.Tensor,
    probe: Probe,
    answer: list[int],
    expected: torch.Tensor,
) -> torch.Tensor:
    """KL(whole cache || what is kept) along an answer, nats ``[n]``."""
    seen = copy_of(cache, model.scored, slice(kept.shape[-1]), 1)
    inputs = torch.tensor([[*probe.tokens, *answer[:-1]]])
    logits = model.logits(inputs, seen, kept, len(answer))[0]
    return divergence(expected, logits.log_softmax(dim=-1))
