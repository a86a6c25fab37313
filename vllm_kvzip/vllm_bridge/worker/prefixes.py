"""Worker side: compressed prefixes, of running requests and for later ones to start from."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip.planning.prefix_seed import checksum
from vllm_kvzip.vllm_bridge.attention.batches import PrefixState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm_kvzip.core import CompressedPrefix, PrefixPlan
    from vllm_kvzip.vllm_bridge.worker.requests import TrackedRequest


@dataclass(frozen=True)
class KeptRun:
    """A compressed prefix that later requests may start from."""

    prefix: CompressedPrefix
    plan: PrefixPlan
    seed: int


class WorkerPrefixes:
    """All compressed prefixes of a worker; runs in the prefix cache go by their serial number.

    Args:
        ttl_seconds: how long a prefix lives without use; None: for ever.

    Attributes:
        states: of running requests that have a compressed prefix, by id.
    """

    def __init__(self, ttl_seconds: float | None = None) -> None:
        self.states: dict[str, PrefixState] = {}
        self._runs: dict[int, KeptRun] = {}
        self._uses = UseTimes(ttl_seconds)

    def add(self, request: TrackedRequest, plan: PrefixPlan, prefix: CompressedPrefix) -> None:
        """A request's prefix has been compressed by that plan."""
        self.states[request.request_id] = PrefixState(prefix, plan)
        if request.kept_as is not None:
            self._runs[request.kept_as] = KeptRun(prefix, plan, request.kept_seed)
            self._uses.starts(request.request_id, request.kept_as)

    def keep(self, serial: int, run: KeptRun) -> None:
        """A run has come from elsewhere; no request uses it yet."""
        self._runs[serial] = run
        self._uses.use(serial)

    def kept(self, serial: int) -> KeptRun | None:
        """A run that later requests may start from; None where there is none."""
        return self._runs.get(serial)

    def start(self, hits: Mapping[str, int]) -> dict[str, PrefixPlan]:
        """Give requests the prefix that they start from.

        Args:
            hits: request -> the run it starts from.

        Returns:
            plans of these prefixes, without requests whose prefix could not be compressed.
        """
        plans = {}
        for request_id, serial in hits.items():
            if (run := self._runs.get(serial)) is not None:
                self.states[request_id] = PrefixState(run.prefix, run.plan)
                self._uses.starts(request_id, serial)
                plans[request_id] = run.plan
        return plans

    def forget(self, request_id: str) -> None:
        """A request has ended, or lost its blocks."""
        self.states.pop(request_id, None)
        self._uses.ends(request_id)

    def drop(self, serial: int) -> None:
        """A run has left the prefix cache."""
        self._runs.pop(serial, None)
        self._uses.drop(serial)

    def step(self) -> None:
        """A step begins; whoever has a prefix uses it."""
        self._uses.step()

    def cached(self) -> list[dict[str, Any]]:
        """Prefixes that later requests can start from, as of the last step.

        Returns:
            for each, ``id`` (a checksum of its tokens) and what :meth:`PrefixPlan.as_told` says.
        """
        return [
            {"id": checksum(run.seed), **run.plan.as_told()}
            for serial, run in self._runs.items()
            if not self._uses.is_over(serial)
        ]


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
        self._counts: Counter[int] = Counter()  # of users, by serial
        self._last: dict[int, float] = {}
        self._last_step = -math.inf

    def starts(self, request_id: str, serial: int) -> None:
        """A request has the prefix from now on."""
        self.ends(request_id)
        self._users[request_id] = serial
        self._counts[serial] += 1
        self.use(serial)

    def use(self, serial: int) -> None:
        """The prefix is used now."""
        self._last[serial] = self._clock()

    def ends(self, request_id: str) -> None:
        """The request has ended."""
        serial = self._users.pop(request_id, None)
        if serial is None:
            return
        if serial in self._last:
            self._last[serial] = max(self._last[serial], self._last_step)
        self._counts[serial] -= 1
        if not self._counts[serial]:
            del self._counts[serial]

    def drop(self, serial: int) -> None:
        """The prefix is gone."""
        self._last.pop(serial, None)

    def step(self) -> None:
        """A step begins; whoever has a prefix uses it."""
        if self._ttl is not None:
            self._last_step = self._clock()

    def is_over(self, serial: int) -> bool:
        """Whether nobody has used the prefix for its time to live."""
        if self._ttl is None:
            return False
        last = self._last.get(serial, -math.inf)
        if serial in self._last and serial in self._counts:
            last = max(last, self._last_step)
        return self._clock() - last >= self._ttl
