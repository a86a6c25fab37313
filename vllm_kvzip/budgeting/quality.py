"""How many pages does a prompt need, so that compressing it costs no more than was asked for?

A fixed keep ratio gives every prompt the same share, whether it says one thing or a hundred. KVzap
(arXiv 2601.07891) drops what scores below a threshold instead, so that the share follows from the
prompt. Here the threshold follows from a promise: a loss in nats a token.

What is dropped of a prompt has a worth: its scores, to a power, summed over all KV heads and
divided by the prompt's tokens. How many nats a token a worth stands for is measured for each model,
on texts that are compressed at many ratios (``LossCurve``). So the loss of any number of pages is
known before one is copied, and the smallest number within the promise is taken.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.budgeting.budgets import with_floors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.budgeting.selection import Ranking
    from vllm_kvzip.core import CacheGeometry, PrefixPlan


@dataclass(frozen=True)
class LossCurve:
    """Nats a token that dropping a worth costs, for the scores of one scorer and one model.

    Attributes:
        power: of the scores.
        points: (worth, nats a token), both above 0 and rising. Between them both are interpolated
            by their logarithms; beyond the ends the loss stays in proportion to the worth.
    """

    power: float
    points: tuple[tuple[float, float], ...]

    def nats(self, worth: float) -> float:
        """Loss of dropping a worth; 0 for nothing."""
        if worth <= 0:
            return 0.0
        worths = [point for point, _ in self.points]
        place = bisect_left(worths, worth)
        if place in (0, len(worths)):
            end, nats = self.points[min(place, len(worths) - 1)]
            return nats * worth / end
        (low, low_nats), (high, high_nats) = self.points[place - 1 : place + 1]
        share = log(worth / low) / log(high / low)
        return exp(log(low_nats) + share * log(high_nats / low_nats))

    @classmethod
    def through(
        cls, power: float, found: Sequence[tuple[float, float]], num_points: int = 10
    ) -> LossCurve:
        """The curve that fits what was measured: mean losses of similar worths, rising.

        Means of the losses themselves, not of their logarithms: prompts that promise the same loss
        then lose so much on average. Neighbours whose means fall are put together (pool adjacent
        violators; Ayer et al. 1955).

        Args:
            power: of the scores.
            found: (worth, nats a token), one a measurement.
            num_points: how many groups the measurements are sorted into.

        Raises:
            ValueError: if fewer than two points are left.
        """
        ordered = sorted(pair for pair in found if min(pair) > 0)
        groups: list[list[tuple[float, float]]] = []
        bounds = [len(ordered) * number // num_points for number in range(num_points + 1)]
        for first, end in pairwise(bounds):
            if first < end:
                groups.append(ordered[first:end])
            while len(groups) > 1 and _mean_nats(groups[-2]) >= _mean_nats(groups[-1]):
                last = groups.pop()
                groups[-1] = groups[-1] + last
        points: list[tuple[float, float]] = []
        for group in groups:
            worth = exp(sum(log(worth) for worth, _ in group) / len(group))
            if not points or worth > points[-1][0]:
                points.append((worth, _mean_nats(group)))
        if len(points) < 2:
            raise ValueError("the losses that were measured do not rise with what is dropped")
        return cls(power, tuple(points))


def _mean_nats(group: Sequence[tuple[float, float]]) -> float:
    return sum(nats for _, nats in group) / len(group)


def worth_of_dropped(
    ranked: torch.Tensor, page_tokens: int, min_pages: int, power: float
) -> torch.Tensor:
    """Worth of what is dropped, by the number of pages that are kept.

    Pages are kept in the order of budget ``adaptive``: the floor of every head, then the best page
    of all heads.

    Args:
        ranked: float32 ``[L, H, T]``, each head's scores from the best to the worst, not negative;
            T a multiple of the page's tokens.
        page_tokens: N.
        min_pages: floor of every head.
        power: of the scores.

    Returns:
        float64 ``[L * H * T / N + 1]``, falling to 0; entry n is for n pages, and has no meaning
        below the floor.
    """
    num_tokens = ranked.shape[2]
    pages = ranked.unflatten(2, (-1, page_tokens))
    mean = with_floors(pages.mean(dim=-1), min_pages)
    order = mean.flatten().argsort(descending=True, stable=True)
    worth = pages.double().pow(power).sum(dim=-1).flatten()[order]
    dropped = worth.flip(0).cumsum(0).flip(0)
    return torch.cat([dropped, dropped.new_zeros(1)]) / num_tokens


@dataclass(frozen=True)
class QualityTarget:
    """Chooses how many blocks a prompt keeps.

    Attributes:
        curve: of the model and scorer.
        geometry: of the layers that share each block.
        num_ranks: how many workers share the KV heads. Each knows the scores of its own, and takes
            those of the others for alike.
    """

    curve: LossCurve
    geometry: CacheGeometry
    num_ranks: int = 1

    def fit(self, ranking: Ranking, plan: PrefixPlan) -> PrefixPlan:
        """The plan with the fewest blocks within its quality loss, and the loss they stand for.

        Where not even all blocks that were reserved are enough, all are used; the estimated loss
        is above the promise then. Waits for the device that has the scores.

        Args:
            ranking: of each head's tokens.
            plan: of the prompt; has a quality loss.
        """
        geometry, wanted = self.geometry, plan.quality_loss
        assert wanted is not None
        least = -(-plan.min_pages_per_head // geometry.pages_per_head)
        most = plan.num_compressed_blocks
        by_pages = worth_of_dropped(
            ranking.scores, geometry.page_tokens, plan.min_pages_per_head, self.curve.power
        )
        worths = by_pages[:: geometry.pages_per_block].tolist()
        for num_blocks in range(min(least, most), most + 1):
            nats = self.curve.nats(worths[num_blocks] * self.num_ranks)
            if nats <= wanted or num_blocks == most:
                break
        return plan.fitted(num_blocks, nats)
