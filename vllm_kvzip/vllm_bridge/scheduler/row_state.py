"""Scheduler side: how far the block table row of one request has come.

The row goes through three shapes::

    prefill      [prompt blocks ...]
    crossing     [prompt blocks ...][n' reserved blocks]      the step that completes the prefix
    folded       [n' compressed][null ...][dense tail ...]    from a later step on

In the folded row the block of logical index ``i`` is again at ``row[i]`` for every dense token, so
vLLM's slot mapping, block accounting and prefix caching go on unchanged. The null block fills the
places between the compressed blocks and the dense tail. In the fold the prompt's blocks return to
the pool. They were not overwritten, so they stay valid in the prefix cache until the pool gives
them to another request.

A request that starts from a cached compressed prefix has a folded row from its first step on. With
a prefill budget a folded row crosses again each time its dense tail has grown by a round.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.contexts.source import RunSource
    from vllm_kvzip.vllm_bridge.symbols import KVCacheBlock, Request


Terms = tuple[float, float | None]
"""See :attr:`~vllm_kvzip.core.PrefixPlan.terms`."""

_serials = itertools.count(1)


@dataclass(eq=False)
class PrefixRun:
    """The blocks of one compressed prefix.

    Attributes:
        plan: its boundary and block counts.
        blocks: blocks that hold what is kept.
        prefix_hash: vLLM's hash of the block that ends at the boundary, which covers all tokens
            before it; None when prefix caching is off.
        serial: number of the run; no other run ever has it, even if it gets the same blocks.
        users: how many rows begin with the run.
        last_used: when a request last used it, in seconds on the cache's clock.
        source: its tokens, once it has been cached where such prefixes travel; else None.
    """

    plan: PrefixPlan
    blocks: list[KVCacheBlock]
    prefix_hash: bytes | None = None
    serial: int = field(default_factory=lambda: next(_serials))
    users: int = 0
    last_used: float = 0.0
    source: RunSource | None = None

    @property
    def key(self) -> tuple[bytes, Terms]:
        """Prefix hash and terms; a request starts from the run only if both are its own."""
        assert self.prefix_hash is not None
        return self.prefix_hash, self.plan.terms


@dataclass(frozen=True)
class Reservation:
    """Blocks at the end of a crossing row that are to hold the compressed prefix.

    Attributes:
        start: index of the first of them in the row.
        run: the blocks, and the plan of the compression that fills them.
        num_tokens: computed tokens once the crossing step has run; those behind them are computed
            over the compressed prefix.
    """

    start: int
    run: PrefixRun
    num_tokens: int


@dataclass(eq=False)
class RowState:
    """State of one row.

    It begins when the request gets its first blocks. It ends when the request gives its blocks up:
    when it is finished, aborted or preempted.

    Attributes:
        request: the request that owns the row.
        plan: the next compression; None when none follows.
        run: the compressed prefix that the row begins with; None before the first fold.
        reservation: blocks that the row holds for its next fold; None unless it is crossing.
        num_found_raw_tokens: tokens that it took from the raw prefix cache when it began, or that a
            KV connector loads.
        num_loading_tokens: tokens until whose end such a load fills it; 0 once it has.
        begins_load: the load begins in the step that is being scheduled.
        num_raw_tokens: tokens that were computed while the row began with raw blocks. Set when the
            first blocks are reserved; None before, and in a row that began with a run.
        has_hit: it began with a run in the step that is being scheduled.
        has_crossed: blocks were reserved in the step that is being scheduled.
        round_blocks: what its largest round to come keeps; 0 where none comes.
        settled_blocks: what it holds on average while it answers in rounds; 0 without rounds.
        busy_from: while fewer tokens than that are computed, the row needs nothing but blocks for
            its next tokens; 0 while it is crossing. What is asked for each running request in each
            step is decided by this one number.
    """

    request: Request
    plan: PrefixPlan | None
    run: PrefixRun | None = None
    reservation: Reservation | None = None
    num_found_raw_tokens: int = 0
    num_loading_tokens: int = 0
    begins_load: bool = False
    num_raw_tokens: int | None = None
    has_hit: bool = False
    has_crossed: bool = False
    round_blocks: int = 0
    settled_blocks: int = 0
    busy_from: int = 0

    def __post_init__(self) -> None:
        self._rest()

    def start_from(self, run: PrefixRun) -> None:
        """The row begins with a compressed prefix from the prefix cache."""
        self.run = run
        self.has_hit = True

    def num_reserved_blocks(self, num_tokens: int) -> int:
        """Reserved blocks that the row holds once ``num_tokens`` tokens are computed."""
        if self.reservation is not None:
            return len(self.reservation.run.blocks)
        return 0 if self.plan is None else self.plan.num_blocks_to_reserve(num_tokens)

    def blocks_to_come(self, row_length: int) -> int:
        """Blocks that the row lacks of those that it will hold on average.

        Args:
            row_length: entries of the row, null blocks among them.
        """
        held = row_length
        if self.run is not None:
            held -= self.run.plan.num_prefix_blocks - self.run.plan.num_compressed_blocks
        return max(0, self.settled_blocks - held)

    def crosses(self, num_tokens: int) -> bool:
        """Whether the step that computes up to ``num_tokens`` tokens completes the next prefix.

        To be asked once for each step that the row gets blocks for. A step that computes nothing
        completes nothing: it only begins a load.
        """
        begins_load, self.begins_load = self.begins_load, False
        if begins_load and num_tokens <= self.num_loading_tokens:
            return False
        self.num_loading_tokens = 0
        if self.reservation is None:
            self._rest()
        return self.reservation is None and self.num_reserved_blocks(num_tokens) > 0

    def loads(self, num_local_tokens: int, num_external_tokens: int) -> None:
        """A KV connector loads raw blocks behind the tokens that vLLM's own cache has."""
        self.begins_load = True
        self.busy_from = 0  # until crosses() finds that the load has ended
        self.num_loading_tokens = num_local_tokens + num_external_tokens
        self.num_found_raw_tokens = self.num_loading_tokens

    def reserve(self, reservation: Reservation) -> None:
        """The row is crossing from now on.

        Args:
            reservation: the blocks that were appended to it.
        """
        if self.run is None:
            self.num_raw_tokens = reservation.num_tokens
        self.reservation = reservation
        self.has_crossed = True
        self.busy_from = 0

    def most_tail_tokens(self, num_tokens: int) -> int:
        """Of ``num_tokens`` tokens of the request, how many may be published as computed over the
        run that its row begins with.

        Behind the crossing step the next compressed prefix is read, and the reserve stands in the
        row where these tokens' blocks would.
        """
        if self.reservation is None:
            return num_tokens
        return min(num_tokens, self.reservation.num_tokens)

    def can_fold(self, num_processed_tokens: int) -> bool:
        """Whether the step that completes the prefix has been processed.

        Args:
            num_processed_tokens: tokens that no step under way computes any more.
        """
        if self.reservation is None:
            return False
        return num_processed_tokens >= self.reservation.run.plan.ready_tokens

    def fold(self, next_plan: PrefixPlan | None) -> None:
        """The row begins with what was reserved; ``next_plan`` is the compression after it."""
        assert self.reservation is not None
        self.run = self.reservation.run
        self.reservation = None
        self.plan = next_plan
        if next_plan is None:
            self.round_blocks = 0
        self._rest()

    def _rest(self) -> None:
        self.busy_from = sys.maxsize if self.plan is None else self.plan.ready_tokens
