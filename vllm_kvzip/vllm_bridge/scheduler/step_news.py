"""Scheduler side: what a scheduled step changes, and how the workers learn of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.planning.prefix_seed import prefix_seed
from vllm_kvzip.vllm_bridge.contexts.source import RunSource
from vllm_kvzip.vllm_bridge.step_message import StepPrefixes

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

    from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import CompressedPrefixCache
    from vllm_kvzip.vllm_bridge.scheduler.row_state import RowState
    from vllm_kvzip.vllm_bridge.scheduler.unconfirmed import UnconfirmedRuns


def publish_step(
    rows: Iterable[RowState],
    scheduled: Container[str],
    prefixes: CompressedPrefixCache,
    unconfirmed: UnconfirmedRuns,
    repeats: dict[str, int],
) -> StepPrefixes | None:
    """Publish the prefixes that a scheduled step completes; gather what the workers must know.

    The workers compact at the start of the next step, also when the request has ended by then. So
    a request that is scheduled after this call can start from the run.

    Args:
        rows: those that the step has changed; what they note of it is taken.
        scheduled: ids of the requests in the step.
        prefixes: where the runs are published.
        unconfirmed: remembers the compressions that the step orders.
        repeats: how many chunks of a request's context the model repeats before the step.

    Returns:
        None when there is nothing to tell.
    """
    kept, hits, reserved, seeds = {}, {}, {}, {}
    for row in rows:
        request_id = row.request.request_id
        if row.has_hit and row.run is not None:
            hits[request_id] = row.run.serial
        if row.has_crossed and row.reservation is not None and request_id in scheduled:
            run = row.reservation.run
            reserved[request_id] = run.serial
            unconfirmed.add(run, row.request)
            if run.prefix_hash and prefixes.add(run):
                kept[request_id] = run.serial
                if run.plan.start_blocks:  # the worker knows the seed of the first one
                    tokens = row.request.all_token_ids
                    seeds[request_id] = prefix_seed(tokens, run.plan.boundary_tokens)
                if prefixes.keeps_tokens:
                    run.source = RunSource.of(row.request, run.plan.boundary_tokens)
        row.has_hit = row.has_crossed = False
    dropped, left_alone = prefixes.take_dropped(), unconfirmed.take_left_alone()
    news = kept, hits, dropped, reserved, left_alone, repeats, seeds
    return StepPrefixes(*news) if any(news) else None
