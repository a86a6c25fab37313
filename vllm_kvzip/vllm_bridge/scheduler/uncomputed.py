"""Scheduler side: blocks that were published for a step which then did not compute them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.scheduler.block_manager import HeadPageManager
    from vllm_kvzip.vllm_bridge.symbols import Request


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
        of_group.block_pool.evict_blocks(
            {
                block.block_id
                for block in given_up  # blocks of a run are written also after a preemption
                if block.block_hash is not None and manager.prefixes.owner([block]) is None
            }
        )
