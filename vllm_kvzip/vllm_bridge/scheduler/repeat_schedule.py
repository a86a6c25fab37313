"""Scheduler side: before which step the model repeats which chunks of which contexts.

Repeating a long context at once would make all other requests wait. So a step and the chunks that
are repeated before it share vLLM's token budget: together they take about as long as a full step,
whatever the length of the context. Decoding requests get their tokens in every step; only prefill
is cut short.

A request stops one token before the end of its context and waits there until all chunks but the
last are repeated. Then it goes on. The last chunk is repeated when the prefix is complete, just
before it is compressed. A context of one chunk is repeated there too, without waiting. Requests are
served in the order in which they arrive.

What is decided here reaches the workers with the step, so that all of them repeat the same chunks.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.symbols import RequestStatus

if TYPE_CHECKING:
    from collections.abc import Container

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.reconstruction import RepeatRule
    from vllm_kvzip.vllm_bridge.symbols import Request


@dataclass
class _Waiting:
    """A request that waits one token before its context's end.

    Attributes:
        request: the request.
        left: tokens to feed to the model for each chunk that has not been repeated.
        may_cross: whether it may complete its context in this step.
    """

    request: Request
    left: deque[int]
    may_cross: bool = False


class RepeatSchedule:
    """Shares the steps' token budget between vLLM's prefill and repeated contexts.

    Args:
        rule: how contexts are cut.
        step_tokens: budget of a step.
        decode_tokens: tokens of a request that decodes, at most.
    """

    def __init__(self, rule: RepeatRule, step_tokens: int, decode_tokens: int = 1) -> None:
        self._rule = rule
        self._step_tokens = step_tokens
        self._decode_tokens = decode_tokens
        self._waiting: dict[str, _Waiting] = {}  # in order of arrival
        self._arriving: dict[str, _Waiting] = {}  # in the step that is being scheduled
        self._crossing: dict[str, int] = {}  # in that step: tokens to feed for the last chunk
        self._orders: dict[str, int] = {}  # chunks that are repeated before that step
        self._due = 0  # tokens to feed for the contexts that were completed in the last step
        self._prefill_room = step_tokens
        self._crossing_room = step_tokens

    def step_starts(self, is_paused: bool = False) -> None:
        """Choose what is repeated before the step that is about to be scheduled.

        Args:
            is_paused: nothing is repeated.
        """
        self._drop_ended()
        self._arriving, self._crossing, self._orders = {}, {}, {}
        if is_paused:
            return
        used, self._due = self._due, 0
        for waiting in self._waiting.values():
            waiting.may_cross = False
        for key, waiting in self._waiting.items():
            left = waiting.left
            while len(left) > 1 and self._fits(left[0], self._step_tokens - used):
                used += left.popleft()
                self._orders[key] = self._orders.get(key, 0) + 1
            if len(left) > 1:
                break
        self._prefill_room = max(0, self._step_tokens - used)
        # Room before the next step, for last chunks: waiting requests come first, in order.
        room = self._step_tokens
        for waiting in self._waiting.values():
            waiting.may_cross = len(waiting.left) == 1 and self._fits(waiting.left[0], room)
            room -= waiting.left[0]
            if room <= 0 or not waiting.may_cross:
                break
        self._crossing_room = room

    def next_stop(
        self, request: Request, plan: PrefixPlan | None, first: int, num_tokens: int
    ) -> int:
        """How many tokens a request may compute in the step that is being scheduled.

        Args:
            request: the request.
            plan: what is compressed of it next.
            first: position of the first of them.
            num_tokens: what vLLM would compute.
        """
        is_prefill = num_tokens > self._decode_tokens
        waiting = self._waiting.get(request.request_id)
        if is_prefill:
            least = 1 if waiting and waiting.may_cross else 0
            num_tokens = min(num_tokens, max(least, self._prefill_room))
        if plan is not None and num_tokens and first + num_tokens >= plan.ready_tokens:
            num_tokens = self._complete(request, waiting, plan, first, num_tokens)
        if is_prefill:
            self._prefill_room = max(0, self._prefill_room - num_tokens)
        return num_tokens

    def step_ends(self, scheduled: Container[str]) -> dict[str, int]:
        """The step has been scheduled.

        Args:
            scheduled: ids of the requests in it.

        Returns:
            how many chunks are repeated before it, by request.
        """
        self._drop_ended()
        orders = {key: count for key, count in self._orders.items() if key in self._waiting}
        for key, tokens in self._crossing.items():
            if key in scheduled:
                self._waiting.pop(key, None)
                self._due += tokens
        for key, waiting in self._arriving.items():
            if key in scheduled:
                self._waiting[key] = waiting
        return orders

    def _complete(
        self,
        request: Request,
        waiting: _Waiting | None,
        plan: PrefixPlan,
        first: int,
        num_tokens: int,
    ) -> int:
        """How many tokens a request may compute, when ``num_tokens`` would complete its context.

        Args:
            request, plan, first, num_tokens: see :meth:`next_stop`.
            waiting: the request's entry, if it waits.
        """
        key = request.request_id
        if waiting is not None:
            may_cross, last = waiting.may_cross, waiting.left[-1]
        else:
            fed = self._rule.fed_tokens(plan.boundary_tokens)
            last = fed[-1]
            may_cross = len(fed) == 1 and self._fits(last, self._crossing_room)
            if may_cross:
                self._crossing_room -= last
        if may_cross:
            self._crossing[key] = last
            return num_tokens
        num_tokens = max(0, plan.ready_tokens - first - 1)
        if waiting is None:
            arriving = _Waiting(request, deque(fed))
            if num_tokens:
                self._arriving[key] = arriving
            elif request.status == RequestStatus.RUNNING:  # it is there already
                self._waiting[key] = arriving
        return num_tokens

    def _fits(self, tokens: int, room: int) -> bool:
        """Whether ``tokens`` fit into ``room``; into the room of a whole step any number does."""
        return tokens <= room or room >= self._step_tokens

    def _drop_ended(self) -> None:
        """Forget requests that ended or lost their blocks."""
        self._waiting = {
            key: waiting
            for key, waiting in self._waiting.items()
            if waiting.request.status == RequestStatus.RUNNING
        }
