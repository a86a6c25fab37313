"""Shares and means of answers that come in clusters, one per context, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import correlation

Counts = Sequence[tuple[int, int]]  # right and all answer tokens of each context


def accuracy(counts: Counts) -> float:
    """Right answer tokens / all of them."""
    return sum(right for right, _ in counts) / sum(total for _, total in counts)


def interval(counts: Counts) -> tuple[float, float]:
    """95 % interval of a share whose answers come in clusters, one per context.

    Wilson's interval (1927) for as many independent answers as have the same variance: answers
    about one context stand or fall together (design effect, Kish 1965).
    """
    total = sum(n for _, n in counts)
    mean = accuracy(counts)
    effective = float(total)
    if 0 < mean < 1 and len(counts) > 1:
        spread = sum((right - mean * n) ** 2 for right, n in counts) / total**2
        variance = spread * len(counts) / (len(counts) - 1)
        effective = min(effective, mean * (1 - mean) / max(variance, 1e-12))
    z = 1.96
    middle = mean + z * z / (2 * effective)
    half = z * sqrt(mean * (1 - mean) / effective + z * z / (4 * effective**2))
    scale = 1 + z * z / effective
    return (middle - half) / scale, (middle + half) / scale


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def mean_of_clusters(sums: Sequence[tuple[float, int]]) -> Estimate | None:
    """Mean of values that come in clusters, one per context; None when there is no value.

    The ratio estimator's interval: contexts are what is drawn, not values, with Student's t.

    Args:
        sums: sum and number of the values of each cluster.
    """
    sums = [(total, count) for total, count in sums if count]
    if not sums:
        return None
    num_values = sum(count for _, count in sums)
    mean = sum(total for total, _ in sums) / num_values
    freedom = len(sums) - 1
    if freedom == 0:
        return Estimate(mean, float("-inf"), float("inf"))
    spread = sum((total - mean * count) ** 2 for total, count in sums)
    half = student_t(freedom) * sqrt(spread * len(sums) / freedom) / num_values
    return Estimate(mean, mean - half, mean + half)


def student_t(freedom: int) -> float:
    """Student's t that 2.5 % exceed, by its expansion around the normal one (Abramowitz 26.7.5)."""
    z = 1.959964
    terms: tuple[float, ...] = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / float(freedom**power) for power, term in enumerate(terms, 1))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's; equal values share their mean rank. 0 where one of them never changes.

    Args:
        first, second: equally many.
    """
    if len(set(first)) < 2 or len(set(second)) < 2:
        return 0.0
    return correlation(_ranks(first), _ranks(second))


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    places: dict[float, list[int]] = {}
    for place, value in enumerate(ordered):
        places.setdefault(value, []).append(place)
    return [sum(places[value]) / len(places[value]) for value in values]
