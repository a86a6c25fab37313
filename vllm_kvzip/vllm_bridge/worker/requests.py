"""Worker side: follow each request through vLLM's scheduler output until it must be compressed.

Everything needed is in ``SchedulerOutput``, which both of vLLM's model runners get, so this file
knows nothing of a runner. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vllm_kvzip.planning.prefix_seed import prefix_seed
from vllm_kvzip.planning.request_options import options_of
from vllm_kvzip.vllm_bridge.symbols import cdiv

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.planning.request_options import RequestOptions
    from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup
    from vllm_kvzip.vllm_bridge.symbols import NewRequestData, SchedulerOutput


@dataclass
class TrackedRequest:
    """A request that has, or will have, a compressed prefix.

    Attributes:
        plan: what is compressed next; None when nothing is any more.
        first_plan: what is compressed first when it starts afresh.
        num_prompt_tokens, options: what plans follow from.
        seed: depends on the tokens before the boundary only, so equal prefixes are compressed
            equally.
        block_ids: the block table row as the scheduler sent it.
        num_computed_tokens: tokens computed before the current step.
        crossed: the prefix is complete in the cache and the reserve is at the row's end.
        folded: the prefix is compressed, and nothing is compressed any more.
        token_ids: the tokens before the boundary, when the scorer lets the model repeat them.
        rows_of_others: its rows in the other KV cache groups, by group, in the same case. Blocks
            stay in them that the scheduler has freed since.
        kept_as: serial of the run that later requests may start from, once it is compressed.
        serial: of that run, whether or not it is kept.
        kept_seed: of all tokens of that run, by which it is listed.
    """

    request_id: str
    plan: PrefixPlan | None
    first_plan: PrefixPlan | None
    num_prompt_tokens: int
    options: RequestOptions
    seed: int
    block_ids: list[int]
    num_computed_tokens: int
    crossed: bool = False
    folded: bool = False
    reserve_start: int = field(default=0)
    kept_as: int | None = None
    serial: int | None = None
    kept_seed: int = 0
    token_ids: Sequence[int] = ()
    rows_of_others: dict[int, list[int]] = field(default_factory=dict)


class RequestTracker:
    """Requests that have, or will have, a compressed prefix; all others are forgotten at once.

    A step looks only at those that something is still to be compressed of: most requests of a busy
    server decode, and have nothing left to wait for.

    Args:
        rule: the rule the scheduler's block manager uses as well.
        group: the KV cache group of the compressed layers.
        repeats: whether the model repeats contexts, so that a request's token ids and its rows in
            other groups are kept.
    """

    def __init__(self, rule: PrefixRule, group: CompressedGroup, repeats: bool = False) -> None:
        self._rule = rule
        self._repeats = repeats
        self._group = group
        self._requests: dict[str, TrackedRequest] = {}
        self._open: dict[str, TrackedRequest] = {}  # those of them that are not folded

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> TrackedRequest | None:
        """The tracked request of that id, or None when it is left alone."""
        return self._requests.get(request_id)

    def forget(self, request_id: str) -> None:
        """Nothing of a request is compressed any more."""
        self._requests.pop(request_id, None)
        self._open.pop(request_id, None)

    def drop_ended(self, output: SchedulerOutput) -> list[str]:
        """Forget what was kept for requests that ended or lost their blocks; returns their ids.

        A preempted request is still known afterwards: model runner V1 is not told its prompt again
        when it resumes, only its new row. Requests that are not tracked are named as well: one that
        would be left alone may have resumed on a compressed prefix.
        """
        dropped = set(output.finished_req_ids)
        for rid in self.finished(output):
            if self._requests.pop(rid, None):
                self._open.pop(rid, None)
                dropped.add(rid)
        for rid in self.suspended(output):
            dropped.add(rid)
            if request := self._requests.get(rid):
                request.crossed = request.folded = False
                self._open[rid] = request
                request.plan = request.first_plan
                request.kept_as = None
                request.block_ids = []
                request.rows_of_others = {}
        return sorted(dropped)

    @staticmethod
    def finished(output: SchedulerOutput) -> set[str]:
        """Ids whose request is over; an id may come back at once, for a new request."""
        return {*output.finished_req_ids, *(new.req_id for new in output.scheduled_new_reqs)}

    @staticmethod
    def suspended(output: SchedulerOutput) -> set[str]:
        """Ids of requests that lost their blocks, and of those that got new ones."""
        return {*(output.preempted_req_ids or ()), *output.scheduled_cached_reqs.resumed_req_ids}

    def new_blocks(self, output: SchedulerOutput) -> Iterator[tuple[str, Sequence[int]]]:
        """Blocks that a step gives to requests, without those found in the prefix cache.

        Blocks of all KV cache groups, as each group takes its blocks from the same pool.
        """
        for new in output.scheduled_new_reqs:
            yield from self._after(new.req_id, new.block_ids, new.num_computed_tokens)
        running = output.scheduled_cached_reqs
        for index, rid in enumerate(running.req_ids):
            blocks = running.new_block_ids[index]
            if blocks is not None:
                found = running.num_computed_tokens[index]
                yield from self._after(rid, blocks, found if rid in running.resumed_req_ids else 0)

    def _after(
        self, request_id: str, blocks: Sequence[Sequence[int]], num_tokens: int
    ) -> Iterator[tuple[str, Sequence[int]]]:
        """Each group's blocks after so many tokens; a KV connector may fill a part of a block."""
        for size, of_group in zip(self._group.block_sizes, blocks, strict=True):
            if given := of_group[cdiv(num_tokens, size) :]:
                yield request_id, given

    def advance(
        self, output: SchedulerOutput, hits: Mapping[str, PrefixPlan] | None = None
    ) -> None:
        """Take in new requests and new blocks of the step that is about to run.

        Must come after the compaction of what the last step completed: the blocks named here are
        appended to the folded row.

        Args:
            output: the step.
            hits: requests that start from a compressed prefix in this step, and its plan.
        """
        hits = hits or {}
        for new in output.scheduled_new_reqs:
            self._add(new, hits.get(new.req_id))
        if not self._open:
            return
        running = output.scheduled_cached_reqs
        for index, rid in enumerate(running.req_ids):
            request = self._open.get(rid)
            if request is None:
                continue
            request.num_computed_tokens = running.num_computed_tokens[index]
            new_block_ids = running.new_block_ids[index]
            if new_block_ids is not None:
                self._append(request, new_block_ids)
            if rid in hits:
                self._go_on(request, hits[rid])

    def _append(self, request: TrackedRequest, block_ids: Sequence[Sequence[int]]) -> None:
        """Append new blocks to a request's rows."""
        request.block_ids.extend(self._group.row(block_ids))
        if self._repeats:
            for group_id, blocks in self._group.rows_of_others(block_ids).items():
                request.rows_of_others.setdefault(group_id, []).extend(blocks)

    def folded(self, request: TrackedRequest, row: list[int]) -> None:
        """A request's prefix has been compressed, and its row folded to ``row``."""
        assert request.plan is not None
        request.block_ids = row
        self._go_on(request, request.plan)

    def _go_on(self, request: TrackedRequest, done: PrefixPlan) -> None:
        """After a compression, or from a compressed prefix."""
        request.plan = self._rule.next_plan(request.num_prompt_tokens, request.options, done)
        request.folded = request.crossed = request.plan is None
        if request.folded:
            self._open.pop(request.request_id, None)

    def in_prefill(self, output: SchedulerOutput) -> list[tuple[TrackedRequest, int]]:
        """Requests of a step whose prefix is not complete before it.

        Args:
            output: the step.

        Returns:
            each of them, and how many of its tokens the step computes.
        """
        found = []
        for request_id, request in self._open.items():
            num_tokens = output.num_scheduled_tokens.get(request_id)
            if num_tokens is not None and not request.crossed and request.plan is not None:
                found.append((request, num_tokens))
        return found

    def crossing(self, output: SchedulerOutput) -> Iterator[TrackedRequest]:
        """Requests whose prefix is complete once the step of ``output`` has run; marks them."""
        for request, num_scheduled in self.in_prefill(output):
            assert request.plan is not None
            if request.num_computed_tokens + num_scheduled >= request.plan.ready_tokens:
                request.crossed = True
                request.reserve_start = len(request.block_ids) - request.plan.num_compressed_blocks
                yield request

    def _add(self, new: NewRequestData, hit: PrefixPlan | None) -> None:
        options = options_of(new.sampling_params)
        plan = self._rule.next_plan(new.prompt_len, options)
        if plan is None and hit is None:
            return
        boundary = plan.boundary_tokens if plan else 0
        token_ids = new.prompt_token_ids or ()
        request = TrackedRequest(
            request_id=new.req_id,
            plan=plan,
            first_plan=plan,
            num_prompt_tokens=new.prompt_len,
            options=options,
            seed=prefix_seed(token_ids, boundary),
            block_ids=[],
            num_computed_tokens=new.num_computed_tokens,
            token_ids=token_ids[:boundary] if self._repeats else (),
        )
        self._append(request, new.block_ids)
        self._requests[new.req_id] = self._open[new.req_id] = request
        if hit is not None:
            self._go_on(request, hit)
