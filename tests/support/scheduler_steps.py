"""Scheduler outputs of vLLM's own classes, made by hand."""

import dataclasses

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

FIELDS = {field.name for field in dataclasses.fields(SchedulerOutput)}
# Required before vLLM 0.32, which has no cascade attention.
OLDER_FIELDS = {"num_common_prefix_blocks": [0]} if "num_common_prefix_blocks" in FIELDS else {}


def new_request(request_id, num_tokens, block_ids, num_computed=0):
    return NewRequestData(
        request_id, list(range(num_tokens)), [], None, None, (block_ids,), num_computed, None
    )


def output(new=(), running=(), scheduled=None, finished=(), resumed=(), preempted=()):
    """``running``: (id, computed tokens, new block ids)."""
    cached = CachedRequestData.make_empty()
    cached.req_ids = [item[0] for item in running]
    cached.num_computed_tokens = [item[1] for item in running]
    cached.new_block_ids = [None if item[2] is None else (item[2],) for item in running]
    cached.num_output_tokens = [0] * len(running)
    cached.resumed_req_ids = set(resumed)
    return SchedulerOutput(
        scheduled_new_reqs=list(new),
        scheduled_cached_reqs=cached,
        num_scheduled_tokens=scheduled or {},
        total_num_scheduled_tokens=sum((scheduled or {}).values()),
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set(finished),
        free_encoder_mm_hashes=[],
        preempted_req_ids=set(preempted),
        **OLDER_FIELDS,
    )
