"""Scheduler side: what was published before it was there, and may have to be taken back.

Rows are folded, blocks freed and prefixes published as if every compression succeeded: nearly all
of them do, and the workers report a step later. Until then this file remembers which requests rely
on which compression, so that all of it can be taken back. :func:`withdraw_uncomputed` takes back
raw blocks that vLLM has published for a step which then does not compute them.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_kvzip.planning.request_options import LEFT_ALONE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from vllm_kvzip.vllm_bridge.outcomes import Fit, Outcome
    from vllm_kvzip.vllm_bridge.scheduler.block_manager import HeadPageManager
    from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import CompressedPrefixCache
    from vllm_kvzip.vllm_bridge.scheduler.row_state import PrefixRun
    from vllm_kvzip.vllm_bridge.stats_export import SchedulerRecorder
    from vllm_kvzip.vllm_bridge.symbols import Request


@dataclass(eq=False)
class _Unconfirmed:
    """One compression.

    Attributes:
        run: its blocks.
        owner: the request whose prompt is compressed.
        takers: requests that have started from its run since.
        folded: prompt length and block size, once the owner's row is folded.
    """

    run: PrefixRun
    owner: Request
    takers: list[Request] = field(default_factory=list)
    folded: tuple[int, int] | None = None


class UnconfirmedRuns:
    """Runs whose compression has been ordered, until the workers report its outcome.

    Args:
        prefixes: cached compressed prefixes.
        recorder: metrics.
    """

    def __init__(self, prefixes: CompressedPrefixCache, recorder: SchedulerRecorder) -> None:
        self._prefixes = prefixes
        self._recorder = recorder
        self._runs: dict[int, _Unconfirmed] = {}
        self._left_alone: list[str] = []

    def __len__(self) -> int:
        return len(self._runs)

    def __contains__(self, run: PrefixRun) -> bool:
        return run.serial in self._runs

    def add(self, run: PrefixRun, owner: Request) -> None:
        """Remember a compression: the step that completes its prefix has been scheduled."""
        self._runs[run.serial] = _Unconfirmed(run, owner)

    def joined(self, run: PrefixRun, taker: Request) -> None:
        """Remember that a request starts from a run."""
        if entry := self._runs.get(run.serial):
            entry.takers.append(taker)

    def folded(self, run: PrefixRun, num_prompt_tokens: int, block_size: int) -> None:
        """The owner's row begins with the run now; counted once the compression is confirmed."""
        if entry := self._runs.get(run.serial):
            entry.folded = (num_prompt_tokens, block_size)
        else:
            self._recorder.compressed(run.plan, num_prompt_tokens, block_size)

    def fits(self, outcomes: Mapping[int, Outcome]) -> Iterator[tuple[PrefixRun, Fit]]:
        """Runs of which a quality loss has decided how many blocks they need."""
        for serial, outcome in outcomes.items():
            entry = self._runs.get(serial)
            if entry is not None and isinstance(outcome, tuple):
                yield entry.run, outcome

    def settle(self, outcomes: Mapping[int, Outcome]) -> dict[Request, str]:
        """Take in the outcomes of some compressions.

        Args:
            outcomes: by serial of the run.

        Returns:
            the requests that a failure affects, and its reason: the owner of the run, and the
            requests that have started from the run.
        """
        affected: dict[Request, str] = {}
        for serial, outcome in outcomes.items():
            entry = self._runs.pop(serial, None)
            if entry is None:
                continue
            if isinstance(outcome, str):
                self._fail(entry, outcome, affected)
            elif entry.folded is not None:
                self._recorder.compressed(entry.run.plan, *entry.folded)
        return affected

    def leave_alone(self, request: Request, reason: str) -> None:
        """Nothing of a request is compressed any more; the workers are told with the next step.

        Args:
            request: it holds no blocks, or is about to give them up.
            reason: one of ``metrics.SKIP_REASONS``.
        """
        params = copy(request.sampling_params)  # samples of one request share it
        assert params is not None  # pooling models are refused
        params.extra_args = {**(params.extra_args or {}), LEFT_ALONE: reason}
        request.sampling_params = params
        self._left_alone.append(request.request_id)

    def take_left_alone(self) -> list[str]:
        """Ids of such requests since the last call."""
        taken, self._left_alone = self._left_alone, []
        return taken

    def _fail(self, entry: _Unconfirmed, reason: str, affected: dict[Request, str]) -> None:
        self._prefixes.failed(entry.run)
        for request in (entry.owner, *entry.takers):
            if request in affected:
                continue
            affected[request] = reason
            self._recorder.skipped(reason)
            own = [serial for serial, other in self._runs.items() if other.owner is request]
            for serial in own:  # later rounds read what this one should have written
                if other := self._runs.pop(serial, None):
                    self._fail(other, reason, affected)


def withdraw_uncomputed(manager: HeadPageManager, request: Request) -> None:
    """Take blocks that a request gives up before it computed them out of the prefix cache.

    Symptom without it: with scheduling policy ``priority`` a request can be preempted while the
    step it belongs to is still being scheduled. vLLM has already published the blocks of that step.
    Any request with the same tokens, such as this one when it resumes, would find blocks that were
    never written. Remove when vLLM takes them back itself (its pull request 43569).

    Args:
        manager: of the compressed group.
        request: about to be preempted. The tokens before its ``num_computed_tokens`` have been
            computed, or a step under way computes them.
    """
    for of_group in (manager, *manager.others.all_managers()):
        first = request.num_computed_tokens // of_group.block_size
        given_up = of_group.req_to_blocks.get(request.request_id, [])[first:]
        has_runs = of_group is manager  # whose blocks are written also after a preemption
        of_group.block_pool.evict_blocks(
            {
                block.block_id
                for block in given_up
                if block.block_hash is not None
                and not (has_runs and manager.prefixes.owner([block]))
            }
        )
