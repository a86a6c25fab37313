"""Worker side: which compressed prefixes are over."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class UseTimes:
    """When prefixes were last used, as far as a worker sees it: in the last step of a user.

    The scheduler ends a prefix by its own clock, and tells the workers with the next step. While
    the engine is idle there is none, so a worker needs this to know which ones are over.

    Args:
        ttl_seconds: how long a prefix lives without use; None: for ever.
        clock: seconds.
    """

    def __init__(
        self, ttl_seconds: float | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl, self._clock = ttl_seconds, clock
        self._users: dict[str, int] = {}  # request -> serial
        self._last: dict[int, float] = {}

    def starts(self, request_id: str, serial: int) -> None:
        """A request has the prefix from now on."""
        self._users[request_id] = serial
        self._last[serial] = self._clock()

    def ends(self, request_id: str) -> None:
        """The request has ended."""
        self._users.pop(request_id, None)

    def drop(self, serial: int) -> None:
        """The prefix is gone."""
        self._last.pop(serial, None)

    def step(self) -> None:
        """A step begins; whoever has a prefix uses it."""
        if self._ttl is not None:
            now = self._clock()
            for serial in self._users.values():
                if serial in self._last:
                    self._last[serial] = now

    def is_over(self, serial: int) -> bool:
        """Whether nobody has used the prefix for its time to live."""
        if self._ttl is None:
            return False
        return self._clock() - self._last.get(serial, -math.inf) >= self._ttl
