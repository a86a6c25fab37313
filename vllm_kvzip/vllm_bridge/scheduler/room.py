"""Scheduler side: room for rounds, so that nobody has to be preempted for one.

With a budget, a request that answers holds up to one and a half budgets, then for a step or two a
budget more, and then one budget. vLLM admits requests by what they hold when they begin. So more of
them would run than the pool can hold later, and those that are preempted read their prompts and
answers again. Two rules make that rare: a request that will have rounds is admitted when the pool
will hold what all of them have on average, and one round; and a round for which no blocks are free
waits while others give enough of them back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.planning.request_options import DEFAULT
from vllm_kvzip.planning.rounds import round_blocks
from vllm_kvzip.vllm_bridge.scheduler.prefix_lookup import options
from vllm_kvzip.vllm_bridge.scheduler.row_state import RowState

if TYPE_CHECKING:
    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.vllm_bridge.scheduler.block_manager import HeadPageManager
    from vllm_kvzip.vllm_bridge.symbols import Request


def new_row(rule: PrefixRule, request: Request, plan: PrefixPlan | None) -> RowState:
    """The state of a new row, which knows what its rounds will need.

    Args:
        rule: what is compressed.
        request: the row's.
        plan: what is compressed of it next.
    """
    row, about = RowState(request, plan), (request.num_prompt_tokens, options(request))
    first = plan
    if rule.has_rounds and plan is not None and not plan.is_round:
        first = rule.next_plan(*about, plan)
    if first is not None and first.is_round:  # later ones keep no more
        row.round_blocks = first.num_compressed_blocks
        row.settled_blocks = rule.settled_blocks(*about)
    return row


def up_to_first_crossing(manager: HeadPageManager, row: RowState, num_tokens: int) -> int:
    """Of all tokens of a request, those that it needs raw blocks for beside its first reserve.

    With rounds a step ends where something is compressed. Without them one step may read the prompt
    and, of a request that was preempted, its answer. Where that and the reserve do not fit into the
    pool, the request is left alone from the next step on.

    Args:
        manager: of the compressed group.
        row: the row that the request would begin, with something to compress.
        num_tokens: of the request.

    Returns:
        more than the pool holds if it cannot begin in this step.
    """
    assert row.plan is not None
    if manager.rule.has_rounds:
        return min(num_tokens, row.plan.ready_tokens)
    num_blocks = -(-num_tokens // manager.block_size)
    if manager.rule.fits(num_blocks + row.plan.num_compressed_blocks):
        return num_tokens
    manager.unconfirmed.leave_alone(row.request, "no_room")
    return int(manager.block_pool.num_gpu_blocks) * manager.block_size


def blocks_to_admit(manager: HeadPageManager, row: RowState, num_blocks: int) -> int:
    """How many blocks must be free so that a waiting request may begin.

    One that will have no round, or is alone, needs no more than its own blocks.

    Args:
        manager: of the compressed group.
        row: the row that it would begin.
        num_blocks: that it needs up to its first compression.
    """
    others = {name: other for name, other in manager.rows.items() if other is not row}
    if not row.round_blocks or not others:
        return num_blocks
    num_blocks, one_round = max(num_blocks, row.settled_blocks), row.round_blocks
    if num_blocks + one_round > manager.block_pool.get_num_free_blocks():
        return num_blocks + one_round  # too many already, so nobody needs to be asked
    for request_id, other in others.items():
        num_blocks += other.blocks_to_come(len(manager.req_to_blocks[request_id]))
        one_round = max(one_round, other.round_blocks)
    return num_blocks + one_round


def warning_of_large_budget(rule: PrefixRule, max_tokens: int) -> str | None:
    """What to tell who has set a decode budget whose rounds the pool cannot hold; None if it can.

    Args:
        rule: what is compressed.
        max_tokens: of the longest request.
    """
    budget = rule.decode_budget(DEFAULT)
    if budget is None or rule.prefill_blocks is not None:
        return None
    first = budget + round_blocks(budget)
    if first * rule.block_size > max_tokens or rule.fits(first + budget):
        return None
    return (
        f"Rounds of answers are left out where nothing was compressed before, because the KV cache "
        f"of {rule.pool_blocks} blocks does not hold {first} blocks and a decode_budget of "
        f"{budget} blocks at once; lower decode_budget."
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

    A round for which too few blocks are free waits, if those will do that rows give back which are
    crossing. While one waits, nobody new is admitted, and later rounds wait behind it. With
    priorities nobody waits for a less important request.

    Args:
        manager: of the compressed group.
        request: the request.
        plan, must_wait, first, num_tokens: see :meth:`PrefixRule.next_stop`.
    """
    about = request.num_prompt_tokens, options(request)
    stop = manager.rule.next_stop(*about, plan, must_wait, first, num_tokens)
    row = manager.rows.get(request.request_id)
    if row is None:
        return stop
    if row.reservation is not None:
        return _stop_beside_reserve(manager, row, first, stop)
    if row.plan is None or first + stop < row.plan.ready_tokens:
        return stop
    if (ahead := manager.waiting_round) is None or not _gives_way(manager, request, ahead):
        blocks = -(-(first + stop) // manager.block_size) + row.plan.num_compressed_blocks
        blocks -= len(manager.req_to_blocks[request.request_id])
        free = manager.block_pool.get_num_free_blocks()
        if blocks <= free or blocks > free + _blocks_to_come_back(manager, request):
            return stop
        manager.waiting_round = ahead or request
    return max(0, row.plan.ready_tokens - 1 - first)


def _stop_beside_reserve(manager: HeadPageManager, row: RowState, first: int, stop: int) -> int:
    """How many tokens a step may compute that is scheduled before the row folds.

    It takes blocks that are free, and nobody is preempted for more: the fold gives some back. Where
    no step is under way the row cannot fold, because guesses were wrong, and goes on as any other.
    """
    if not row.request.num_in_flight_tokens or row.reservation is None:
        return stop
    own = len(manager.req_to_blocks[row.request.request_id]) - len(row.reservation.run.blocks)
    most = (own + manager.block_pool.get_num_free_blocks()) * manager.block_size
    return max(0, min(stop, most - first))


def _gives_way(manager: HeadPageManager, request: Request, other: Request) -> bool:
    """Whether a request waits for another one."""
    return not manager.by_priority or other.priority <= request.priority


def _blocks_to_come_back(manager: HeadPageManager, request: Request) -> int:
    """Blocks that rows give back when they fold for which ``request`` waits."""
    return sum(
        block.ref_cnt == 1 and not block.is_null
        for request_id, row in manager.crossing.items()
        if row.reservation is not None and _gives_way(manager, request, row.request)
        for block in manager.req_to_blocks[request_id][: row.reservation.run.plan.num_prefix_blocks]
    )
