"""Measuring work that a device does later than the program that asks for it.

A mark is put into the stream of work; how far two marks are apart is known once both have passed.
On the CPU that is at once. Nobody waits for a device.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


class Clock(Protocol):
    """Marks in a stream of work, and the seconds between them."""

    def mark(self) -> Any:
        """A mark behind everything that has been asked for so far."""
        ...

    def passed(self, mark: Any) -> bool:
        """Whether the work before a mark is done; never waits."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to another; both must have passed."""
        ...


class HostClock:
    """For work that is done when the call returns."""

    def mark(self) -> float:
        """See :class:`Clock`."""
        return perf_counter()

    def passed(self, mark: float) -> bool:
        """See :class:`Clock`."""
        return True

    def seconds(self, begin: float, end: float) -> float:
        """See :class:`Clock`."""
        return end - begin


class CudaClock:
    """For work in the current CUDA stream."""

    def mark(self) -> torch.cuda.Event:
        """See :class:`Clock`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def passed(self, mark: torch.cuda.Event) -> bool:
        """See :class:`Clock`."""
        return bool(mark.query())

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """See :class:`Clock`."""
        return float(begin.elapsed_time(end)) / 1e3


class Stopwatch:
    """Seconds by stage of one piece of work.

    Args:
        clock: makes the marks.
        stages: names that :meth:`seconds` always contains.
    """

    def __init__(self, clock: Clock, stages: tuple[str, ...] = ()) -> None:
        self._clock = clock
        self._stages = stages
        self._spans: list[tuple[str, Any, Any, float]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything asked for inside counts for stage ``name``."""
        begin = self._clock.mark()
        yield
        self.add(name, begin, self._clock.mark())

    def add(self, name: str, begin: Any, end: Any, share: float = 1.0) -> None:
        """Count a share of what lies between two marks for stage ``name``."""
        self._spans.append((name, begin, end, share))

    @property
    def finished(self) -> bool:
        """Whether :meth:`seconds` can be asked."""
        return all(self._clock.passed(end) for _, _, end, _ in self._spans)

    def seconds(self) -> dict[str, float]:
        """Seconds by stage; only when :attr:`finished`."""
        found: dict[str, float] = defaultdict(float, dict.fromkeys(self._stages, 0.0))
        for name, begin, end, share in self._spans:
            found[name] += share * self._clock.seconds(begin, end)
        return dict(found)
