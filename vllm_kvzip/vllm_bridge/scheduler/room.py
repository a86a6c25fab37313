"""Scheduler side: room for rounds, so that nobody has to be preempted for one.

With a budget, a request that answers holds up to one and a half budgets, then for a step or two a
budget more, and then one budget. vLLM admits requests by what they hold when they begin. So more of
them would run than the pool can hold later, and those that are preempted read their prompts and
answers again. Two rules make that rare: a request is admitted when the pool will hold what all of
them have on average; and a round for which no blocks are free waits until another one is through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.vllm_bridge.scheduler.prefix_lookup import options

if TYPE_CHECKING:
    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.scheduler.block_manager import HeadPageManager
    from vllm_kvzip.vllm_bridge.scheduler.row_state import RowState
    from vllm_kvzip.vllm_bridge.symbols import Request


def blocks_to_admit(manager: HeadPageManager, row: RowState, num_blocks: int) -> int:
    """How many blocks must be free so that a waiting request may begin.

    Args:
        manager: of the compressed group.
        row: the row that it would begin.
        num_blocks: that all of its tokens need, if nothing were compressed.
    """
    rule, asked = manager.rule, options(row.request)
    most = rule.most_blocks(row.request.num_prompt_tokens, asked)
    if most is None:
        return num_blocks
    num_blocks = min(num_blocks, most)
    if not manager.rows:
        return num_blocks
    settled = rule.settled_blocks(row.request.num_prompt_tokens, asked)
    one_round = rule.decode_budget(asked) or 0
    num_blocks = max(num_blocks, settled) + one_round
    if num_blocks > manager.block_pool.get_num_free_blocks():
        return num_blocks  # too many already, so nobody needs to be asked
    return num_blocks + sum(
        other.blocks_to_come(len(manager.req_to_blocks[request_id]))
        for request_id, other in manager.rows.items()
    )


def next_stop(
    manager: HeadPageManager,
    request: Request,
    plan: PrefixPlan | None,
    must_wait: bool,
    first: int,
    num_tokens: int,
) -> int:
    """How many tokens of a request a step may compute, so that it ends where a round comes.

    A round for which too few blocks are free waits while other requests cross: what they give back
    when they fold is more than this round needs.

    Args:
        manager: of the compressed group.
        request: the request.
        plan, must_wait, first, num_tokens: see :meth:`PrefixRule.next_stop`.
    """
    about = request.num_prompt_tokens, options(request)
    stop = manager.rule.next_stop(*about, plan, must_wait, first, num_tokens)
    row = manager.rows.get(request.request_id)
    if row is None or row.reservation is not None or not manager.crossing:
        return stop
    if row.plan is None or first + stop < row.plan.ready_tokens:
        return stop
    blocks = -(-(first + stop) // manager.block_size) + row.plan.num_compressed_blocks
    blocks -= len(manager.req_to_blocks[request.request_id])
    if blocks <= manager.block_pool.get_num_free_blocks():
        return stop
    return max(0, row.plan.ready_tokens - 1 - first)
