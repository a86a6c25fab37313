"""Worker side: follow each request through vLLM's scheduler output until it must be compressed.

Everything needed is in ``SchedulerOutput``, which both of vLLM's model runners get, so this file
knows nothing of a runner. No torch here.
"""

from __future__ import annotations

import zlib
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.head_pages import PrefixRule


@dataclass
class TrackedRequest:
    """A request whose prompt is long enough to be compressed.

    Attributes:
        num_prompt_tokens: prompt length in tokens.
        plan: what follows from that length.
        seed: depends on the prompt's tokens only, so equal prompts are compressed equally.
        block_ids: the block table row as the scheduler sent it.
        num_computed_tokens: tokens computed before the current step.
        crossed: the prompt is complete in the cache and the reserve is at the row's end.
        folded: the prefix is compressed.
    """

    request_id: str
    num_prompt_tokens: int
    plan: PrefixPlan
    seed: int
    block_ids: list[int]
    num_computed_tokens: int
    crossed: bool = False
    folded: bool = False
    reserve_start: int = field(default=0)


class RequestTracker:
    """Requests that are, or will be, compressed; all others are forgotten at once.

    Args:
        rule: the rule the scheduler's block manager uses as well.
        group_id: the KV cache group of the compressed layers.
    """

    def __init__(self, rule: PrefixRule, group_id: int = 0) -> None:
        self._rule = rule
        self._group_id = group_id
        self._requests: dict[str, TrackedRequest] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def get(self, request_id: str) -> TrackedRequest | None:
        """The tracked request of that id, or None when it is not to be compressed."""
        return self._requests.get(request_id)

    def drop_ended(self, output: SchedulerOutput) -> list[str]:
        """Forget what was kept for requests that ended or lost their blocks; returns their ids.

        A preempted request is still known afterwards: model runner V1 is not told its prompt again
        when it resumes, only its new row.
        """
        gone = (*output.finished_req_ids, *(new.req_id for new in output.scheduled_new_reqs))
        dropped = [rid for rid in gone if self._requests.pop(rid, None)]
        resumed = output.scheduled_cached_reqs.resumed_req_ids
        for rid in (*(output.preempted_req_ids or ()), *resumed):
            if request := self._requests.get(rid):
                request.crossed = request.folded = False
                request.block_ids = []
                dropped.append(rid)
        return dropped

    def advance(self, output: SchedulerOutput) -> None:
        """Take in new requests and new blocks of the step that is about to run.

        Must follow the compaction of what the last step completed: the blocks named here belong
        behind the folded row.
        """
        for new in output.scheduled_new_reqs:
            self._add(new)
        running = output.scheduled_cached_reqs
        for index, rid in enumerate(running.req_ids):
            request = self._requests.get(rid)
            if request is None or request.folded:
                continue
            request.num_computed_tokens = running.num_computed_tokens[index]
            new_block_ids = running.new_block_ids[index]
            if new_block_ids is not None:
                request.block_ids.extend(new_block_ids[self._group_id])

    def crossing(self, output: SchedulerOutput) -> Iterator[TrackedRequest]:
        """Requests whose prompt is complete once the step of ``output`` has run; marks them."""
        for rid, num_scheduled in output.num_scheduled_tokens.items():
            request = self._requests.get(rid)
            if request is None or request.crossed:
                continue
            if request.num_computed_tokens + num_scheduled >= request.num_prompt_tokens:
                request.crossed = True
                request.reserve_start = len(request.block_ids) - request.plan.num_compressed_blocks
                yield request

    def _add(self, new: NewRequestData) -> None:
        plan = self._rule.plan(new.prompt_len)
        if plan is None:
            return
        tokens = array("q", new.prompt_token_ids or ())
        self._requests[new.req_id] = TrackedRequest(
            request_id=new.req_id,
            num_prompt_tokens=new.prompt_len,
            plan=plan,
            seed=zlib.crc32(tokens.tobytes()),
            block_ids=list(new.block_ids[self._group_id]),
            num_computed_tokens=new.num_computed_tokens,
        )
