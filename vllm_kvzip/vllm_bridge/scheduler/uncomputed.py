"""Scheduler side: blocks that were published for a step which then did not compute them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.scheduler.block_manager import HeadPageManager
    from vllm_kvzip.vllm_bridge.symbols import Request


def withdraw_uncomputed(manager: HeadPageManager, request: Request) -> None:
    """Take blocks that a request gives up before it computed them out of the prefix cache.

    Symptom without it: with scheduling policy ``priority`` a request can be preempted by the very
    step it was scheduled in. vLLM has published the blocks of that step by then, and whoever has
    the same tokens, the request itself first of all, finds blocks that nobody wrote to. Remove when
    vLLM takes them back itself (its pull request 43569).

    Args:
        manager: holds the request's blocks.
        request: about to be preempted; what it counts as computed, a step has computed or will.
    """
    first = request.num_computed_tokens // manager.block_size
    given_up = manager.req_to_blocks.get(request.request_id, [])[first:]
    manager.block_pool.evict_blocks(
        {
            block.block_id
            for block in given_up  # a compressed prefix is written whatever becomes of it
            if block.block_hash is not None and manager.prefixes.owner([block]) is None
        }
    )
