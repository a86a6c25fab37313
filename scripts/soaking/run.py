"""Serve a workload, disturb the engine meanwhile, and check it after every step."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from soaking.workload import NAME, Workload

if TYPE_CHECKING:
    from collections.abc import Iterator

    from soaking.engine_invariants import EngineInvariants

MOST_OPEN = 30  # requests at a time
ARRIVALS_IN_PAUSE = 5
ABORTS, IDLE_RESETS, RESETS, PAUSES = 0.01, 0.005, 0.003, 0.007  # before a step
MORE_OFTEN = 20  # where a request is on its way to its compressed form
KEEP, CLEAR, WAIT, ABORT = PAUSE_KINDS = (
    "pause that keeps requests",
    "pause that clears the cache",
    "pause that lets requests finish",
    "pause that aborts requests",
)
PAUSES_IN_TURN = (KEEP, WAIT, CLEAR, ABORT, *(KEEP, CLEAR, WAIT) * 3)
DISTURBANCES = (
    "abort",
    "reset of running requests",
    "reset of a request in its prompt",
    "reset of a request about to be compressed",
    "reset of a compressed request",
    *PAUSE_KINDS,
    "arrival during a pause",
    "preemption",
    "preemption of a compressed request",
    "preempted sample of several",
    "preempted opt-out",
    "preempted request with a ratio of its own",
)


class Soak:
    """One engine under load.

    vLLM's sleep is a pause that clears the cache, and workers that then give up their memory. On
    the CPU they do not (vLLM says so and goes on), so that pause is all of it that is done here.

    Args:
        engine: vLLM's ``LLMEngine``, in this process.
        workload: what its clients want.
        invariants: checked after every step.

    Attributes:
        happened: what happened, and how often.
        answers: token ids of every sample of the requests that were served to their end, by number.
        disturbed: numbers of requests that lost their blocks.
    """

    def __init__(self, engine: Any, workload: Workload, invariants: EngineInvariants) -> None:
        self._engine = engine
        self._core = engine.engine_core.engine_core
        self._scheduler = self._core.scheduler
        managers = self._scheduler.kv_cache_manager.coordinator.single_type_managers
        (self._manager,) = (manager for manager in managers if hasattr(manager, "rows"))
        self._workload = workload
        self._invariants = invariants
        self._open: set[int] = set()
        self._preemptions: dict[str, int] = {}
        self._pauses, self._pause_left = itertools.cycle(PAUSES_IN_TURN), 0
        self.happened: Counter[str] = Counter()
        self.answers: dict[int, list[list[int]]] = {}
        self.disturbed: set[int] = set()

    def run(self) -> None:
        """Serve everything.

        Raises:
            BrokenInvariantError: see :class:`EngineInvariants`.
        """
        scheduler, workload = self._scheduler, self._workload
        left = list(range(len(workload.requests)))[::-1]
        with tqdm(total=len(left), desc="requests") as bar:
            while left or self._open:
                for _ in range(workload.burst()):
                    most = MOST_OPEN + ARRIVALS_IN_PAUSE * self._core.is_scheduler_paused()
                    if left and len(self._open) < most:
                        self._add(left.pop())
                self._disturb()
                if self._engine.has_unfinished_requests() or scheduler.has_finished_requests():
                    rows = self._manager.rows.items()
                    compressed = {rid for rid, row in rows if row.run is not None}
                    for output in self._engine.step():
                        self._take(output)
                    for request in self._who_lost_blocks():
                        self._note_preemption(request, request.request_id in compressed)
                self._invariants.check()
                self.happened["step"] += 1
                bar.update(len(workload.requests) - len(left) - len(self._open) - bar.n)
        self._core.resume_scheduler()
        while scheduler.has_finished_requests():
            self._engine.step()
        self._invariants.check_idle()

    def ask_again(self, numbers: list[int]) -> dict[int, list[list[int]]]:
        """What some requests are answered when they have the engine to themselves."""
        assert self._engine.reset_prefix_cache()
        for number in numbers:
            request = self._workload.requests[number]
            prompt = {"prompt_token_ids": request.prompt}
            self._engine.add_request(str(number), prompt, request.params(str(number)))
        found = {}
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                found[int(output.request_id)] = [list(one.token_ids) for one in output.outputs]
        return found

    def _add(self, number: int) -> None:
        request = self._workload.requests[number]
        prompt = {"prompt_token_ids": request.prompt}
        priority = request.priority if self._scheduler.policy.value == "priority" else 0
        self._engine.add_request(
            str(number), prompt, request.params(str(number)), priority=priority
        )
        self._open.add(number)
        self.happened["several samples"] += request.num_samples > 1
        self.happened["arrival during a pause"] += self._core.is_scheduler_paused()

    def _take(self, output: Any) -> None:
        number = int(output.request_id)
        if output.finished and number in self._open:
            self._open.remove(number)
            self.answers[number] = [list(sample.token_ids) for sample in output.outputs]

    def _disturb(self) -> None:
        """What may happen between two steps, beside arrivals."""
        workload = self._workload
        if self._open and workload.happens(ABORTS):
            victim = workload.moments.choice(sorted(self._open))
            self._engine.abort_request([str(victim)])
            self._open.remove(victim)
            self.happened["abort"] += 1
        if workload.happens(IDLE_RESETS) and self._engine.reset_prefix_cache():
            self.happened["reset"] += 1
        if workload.happens(RESETS * (MORE_OFTEN if self._somebody_is_on_the_way() else 1)):
            self._reset(lambda: self._engine.reset_prefix_cache(reset_running_requests=True))
        if self._core.is_scheduler_paused():
            self._pause_left -= 1
            if self._pause_left <= 0:
                self._core.resume_scheduler()
        elif self._open and workload.happens(PAUSES):
            self._pause()

    def _somebody_is_on_the_way(self) -> bool:
        """Whether a running request is in the middle of its prompt, or about to be compressed."""
        return any(
            request.num_computed_tokens < request.num_prompt_tokens
            or self._manager.rows[request.request_id].reservation is not None
            for request in self._scheduler.running
        )

    def _pause(self) -> None:
        from vllm.v1.core.sched.interface import PauseState

        kind = next(self._pauses)
        self._pause_left = self._workload.moments.randint(1, 8)
        self.happened[kind] += 1
        if kind == KEEP:
            self._core.pause_scheduler("keep", clear_cache=False)
        elif kind == CLEAR:
            self._reset(lambda: self._core.pause_scheduler("keep", clear_cache=True))
        elif kind == WAIT:
            # An engine in this process refuses mode "wait", since nobody steps it meanwhile; here
            # somebody does, and this state is all of that mode.
            self._scheduler.set_pause_state(PauseState.PAUSED_NEW)
            self._pause_left *= 4
        else:
            self._core.pause_scheduler("abort", clear_cache=True)
            self._engine.abort_request([str(number) for number in sorted(self._open)])
            self._open.clear()

    def _reset(self, do_it: Any) -> None:
        """Take the blocks of running requests away, and note from whom."""
        for request in self._scheduler.running:
            self.happened["reset of running requests"] += 1
            computed, prompt = request.num_computed_tokens, request.num_prompt_tokens
            self.happened["reset of a request in its prompt"] += computed < prompt
            row = self._manager.rows[request.request_id]
            about_to = row.reservation is not None
            self.happened["reset of a request about to be compressed"] += about_to
            is_compressed = row.run is not None
            self.happened["reset of a compressed request"] += is_compressed
        do_it()
        list(self._who_lost_blocks())
        self._invariants.check()

    def _who_lost_blocks(self) -> Iterator[Any]:
        """The scheduler's requests that were preempted since the last call, once for each time."""
        for request in self._scheduler.requests.values():
            before = self._preemptions.get(request.request_id, 0)
            if request.num_preemptions > before:
                self._preemptions[request.request_id] = request.num_preemptions
                self.disturbed.add(int(request.sampling_params.extra_args[NAME]))
                yield request

    def _note_preemption(self, request: Any, was_compressed: bool) -> None:
        asked = self._workload.requests[int(request.sampling_params.extra_args[NAME])]
        self.happened["preemption"] += 1
        self.happened["preemption of a compressed request"] += was_compressed
        self.happened["preempted sample of several"] += asked.num_samples > 1
        self.happened["preempted opt-out"] += asked.opted_out
        self.happened["preempted request with a ratio of its own"] += (
            "kvzip_keep_ratio" in asked.options
        )
