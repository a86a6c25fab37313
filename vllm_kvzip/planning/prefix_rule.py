"""What is compressed, and into how many blocks: known from lengths alone, before any score is.

So scheduler and workers agree without a message, and blocks can be reserved in advance.

With a prefill budget of P blocks no request ever holds much more than that. Whenever P + C blocks
are full, and again after each C blocks more (C is half of P), everything so far is compressed into
P blocks: what was kept before competes with what is new. Where that happens depends on positions
only, so equal prefixes are compressed equally whatever follows them.

A decode budget of P blocks does the same behind the prompt: the prompt is compressed as the keep
ratio says, or left alone, and rounds follow while the answer is generated.

With two tiers P blocks are so many bytes; ``round_tiers.py`` says how a round shares them out.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from vllm_kvzip.core import PrefixPlan
from vllm_kvzip.planning import request_options
from vllm_kvzip.planning.round_tiers import (
    blocks_of_later,
    blocks_within,
    following,
    least_budget,
    with_blocks,
)
from vllm_kvzip.planning.rounds import next_round, round_blocks
from vllm_kvzip.planning.tiers import TierBlocks, TierRule, pages_for

if TYPE_CHECKING:
    from vllm_kvzip.planning.request_options import RequestOptions

_SPARE_BLOCKS = 2  # vLLM's null block, and one for the first generated tokens


@dataclass(frozen=True)
class PrefixRule:
    """How a prompt's length and a request's options decide what is compressed, in how many blocks.

    What a compressed prefix looks like does not depend on tokens after its boundary, so every
    prompt with the same first tokens and the same keep ratio can share it.

    Attributes:
        keep_ratio: kept / all KV pairs of the prefix, or bytes where ``tiers`` says so, in (0, 1];
            a request may name its own.
        min_prompt_tokens: shorter prompts, or declared contexts, are left alone.
        sink_tokens: first tokens of the prefix that every head keeps.
        recent_tokens: last tokens of the prefix that every head keeps.
        block_size: tokens per block.
        min_output_tokens: requests that generate fewer are left alone, unless they declare a
            context that others shall reuse.
        prefill_blocks: the prefill budget in blocks; None reads every prompt raw.
        decode_blocks: the decode budget in blocks; None lets answers grow, unless there is a
            prefill budget, which holds for answers as well. A request may name its own.
        num_guessed_tokens: of those that have been computed, how many of an answer's last ones may
            still be guesses that turn out wrong. A round waits until so many more are computed.
        quality_loss: nats a token that compressing a prompt may cost; the keep ratio is then the
            most that is kept. None: what the keep ratio says is kept. A request may name its own.
        pool_blocks: blocks of the whole pool; a prompt that would not fit into it together with
            its compressed prefix is left alone. None: not known.
        tiers: how a keep ratio becomes blocks; None: all of them hold KV pairs as they are.
        pages_per_head: head pages of one KV head of one layer in a block.
        num_layers, num_dense_layers: layers that have a part of each block, and those of them that
            keep every KV pair: the layers of a draft model.
    """

    keep_ratio: float
    min_prompt_tokens: int
    sink_tokens: int
    recent_tokens: int
    block_size: int
    min_output_tokens: int = 0
    prefill_blocks: int | None = None
    pool_blocks: int | None = None
    tiers: TierRule | None = None
    pages_per_head: int = 1
    num_layers: int = 1
    num_dense_layers: int = 0
    decode_blocks: int | None = None
    num_guessed_tokens: int = 0
    quality_loss: float | None = None

    def plan(
        self, num_prompt_tokens: int, options: RequestOptions = request_options.DEFAULT
    ) -> PrefixPlan | None:
        """The plan for a whole prompt or context, or None when it is left alone.

        Args:
            num_prompt_tokens: length of the prompt.
            options: what the request asks for.
        """
        if self.skip_reason(num_prompt_tokens, options) is not None:
            return None
        num_blocks = self._num_prefix_blocks(num_prompt_tokens, options)
        blocks = self._compressed_blocks(num_blocks, options)
        plan = self._plan_of(num_blocks, blocks, options)
        plan = replace(plan, quality_loss=self.wanted_loss(options))
        if options.context_tokens is None:
            plan = replace(plan, ready_tokens=num_prompt_tokens)
        return plan

    def next_plan(
        self,
        num_prompt_tokens: int,
        options: RequestOptions = request_options.DEFAULT,
        done: PrefixPlan | None = None,
    ) -> PrefixPlan | None:
        """What is compressed next, or None when nothing is any more.

        Args:
            num_prompt_tokens: length of the prompt.
            options: what the request asks for.
            done: the compression that its row begins with: its own, or one of the prefix cache.
        """
        decode_blocks = self.decode_budget(options)
        if done is not None and decode_blocks is None:
            return None
        last = None
        if done is None or done.is_round:
            last = self.plan(num_prompt_tokens, options)
        if decode_blocks is None or (self.prefill_blocks is None and last and done is None):
            return last
        start, held = (done.num_prefix_blocks, done.num_compressed_blocks) if done else (0, 0)
        budget = self.prefill_blocks
        if budget is not None:
            end = next_round(budget, start, held)
            if last is not None and start < last.num_prefix_blocks <= end:
                return self._if_it_fits(self._later_plan(last, budget, done))
        num_guessed = 0
        if budget is None or end * self.block_size > num_prompt_tokens:
            budget, num_guessed = decode_blocks, self.num_guessed_tokens
            end = self._next_decode_round(budget, start, held, num_prompt_tokens)
        plan = replace(self._plan_of(end, TierBlocks(budget, 0), options), is_round=True)
        plan = self._later_plan(plan, budget, done)
        ready, most = plan.ready_tokens + num_guessed, options.max_output_tokens
        if most is not None and ready >= num_prompt_tokens + most:
            return None  # the answer ends before
        return self._if_it_fits(replace(plan, ready_tokens=ready))

    def decode_budget(self, options: RequestOptions) -> int | None:
        """Blocks that a request holds between rounds while it generates; None: no rounds.

        Args:
            options: what the request asks for.
        """
        budgets = [b for b in (self.decode_blocks, self.prefill_blocks) if b is not None]
        if options.is_off or not budgets:
            return None
        if (asked := options.decode_budget) is not None and self.decode_blocks is not None:
            protected = sum(self._protected_in_prefix(sys.maxsize))
            mode = self.tiers.mode if self.tiers else "evict"
            least = least_budget(protected, self.block_size, mode)
            budgets[:1] = [max(least, asked // self.block_size)] if asked else []
        return min(budgets, default=None)

    def next_stop(
        self,
        num_prompt_tokens: int,
        options: RequestOptions,
        plan: PrefixPlan | None,
        must_wait: bool,
        first: int,
        num_tokens: int,
    ) -> int:
        """How many tokens a step may compute, so that it ends where something is compressed.

        Args:
            num_prompt_tokens: length of the prompt.
            options: what the request asks for.
            plan: what is compressed next.
            must_wait: whether another compression must be carried out before it.
            first: position of the step's first token.
            num_tokens: what could be computed.
        """
        # A prefix that was found raw is complete already, and compressed in this step.
        while plan is not None and plan.ready_tokens <= first:
            plan, must_wait = self.next_plan(num_prompt_tokens, options, plan), True
        if plan is None:
            return num_tokens
        return min(num_tokens, plan.ready_tokens - first - must_wait)

    @property
    def has_rounds(self) -> bool:
        """Whether requests are compressed more than once, where they fill a budget."""
        return self.prefill_blocks is not None or self.decode_blocks is not None

    @property
    def peak_blocks(self) -> int | None:
        """The most blocks a request holds with a prefill budget.

        Those that an earlier compression kept, those reserved for the next one, and those of new
        tokens. All of it twice, because with asynchronous scheduling a step is under way while the
        next one is scheduled.
        """
        if self.prefill_blocks is None:
            return None
        most_new = self._most_new_blocks(self.prefill_blocks)
        return 2 * (self.prefill_blocks + most_new) + _SPARE_BLOCKS

    def startup_blocks(self, max_tokens: int) -> int:
        """Blocks that the pool must have for prompts of up to ``max_tokens`` tokens.

        A request may ask for more, by a keep ratio or a decode budget of its own, and the server's
        decode budget may be larger: compressions that do not fit are left out.
        """
        longest = ceil(max_tokens / self.block_size)
        most = self.max_compressed_blocks(max_tokens)
        if self.peak_blocks is None or self.prefill_blocks is None:
            return longest + most
        if longest * self.block_size >= (self.first_round_tokens or 0):
            most = self.prefill_blocks
        return min(longest + most, self.peak_blocks)

    def fits(self, num_blocks: int) -> bool:
        """Whether a request that is alone in the pool can hold so many blocks."""
        return self.pool_blocks is None or num_blocks <= self.pool_blocks - _SPARE_BLOCKS

    def settled_blocks(self, num_prompt_tokens: int, options: RequestOptions) -> int:
        """Blocks that a request holds on average while it answers in rounds; 0 without rounds.

        Args:
            num_prompt_tokens: length of the prompt.
            options: what the request asks for.
        """
        if (budget := self.decode_budget(options)) is None:
            return 0
        settled, most = budget + self._most_new_blocks(budget) // 2, options.max_output_tokens
        if most is None:
            return settled
        return min(settled, ceil((num_prompt_tokens + most) / self.block_size))

    @property
    def first_round_tokens(self) -> int | None:
        """Where a raw prefix is compressed at the latest; None without a prefill budget."""
        if self.prefill_blocks is None:
            return None
        return next_round(self.prefill_blocks, 0, 0) * self.block_size

    def _if_it_fits(self, plan: PrefixPlan) -> PrefixPlan | None:
        """A plan, or None where the pool cannot hold what it reads beside what it keeps."""
        unread = ceil(plan.ready_tokens / self.block_size) - plan.num_prefix_blocks
        crossing = plan.num_source_blocks + unread + plan.num_compressed_blocks
        return plan if self.fits(crossing) else None

    def _most_new_blocks(self, budget: int) -> int:
        """New blocks when a round of an answer comes, guesses among them."""
        return round_blocks(budget) + ceil(self.num_guessed_tokens / self.block_size)

    def _next_decode_round(
        self, budget: int, start_blocks: int, held_blocks: int, num_prompt_tokens: int
    ) -> int:
        """Like :func:`next_round`, behind the prompt.

        What an answer is compressed to is shared with nobody. So without a prefill budget a round
        comes as soon as its new blocks are there, wherever that is.
        """
        if self.prefill_blocks is not None:
            end = next_round(budget, start_blocks, held_blocks)
        else:
            end = start_blocks + max(1, budget + round_blocks(budget) - held_blocks)
        return max(end, start_blocks + 1, ceil(num_prompt_tokens / self.block_size))

    def skip_reason(
        self, num_prompt_tokens: int, options: RequestOptions = request_options.DEFAULT
    ) -> str | None:
        """Why a prompt is left alone, one of ``metrics.SKIP_REASONS``; None when it is not.

        At the server's keep ratio 1.0 a prompt is compressed although nothing is freed: its output
        must equal that of stock vLLM, which is how a deployment is checked.
        """
        if options.is_off:
            return options.left_alone or "off_by_request"
        num_blocks = self._num_prefix_blocks(num_prompt_tokens, options)
        context = options.context_tokens
        if num_blocks == 0 or self.min_prompt_tokens > (
            num_prompt_tokens if context is None else context
        ):
            return "below_min_prompt_tokens"
        num_output = options.max_output_tokens
        if context is None and num_output is not None and num_output < self.min_output_tokens:
            return "below_min_output_tokens"
        blocks = self._compressed_blocks(num_blocks, options)
        is_check = self.keep_ratio == self.wanted_ratio(options) == 1 and not blocks.quantized
        may_fit = self.wanted_loss(options) is not None and blocks.total == num_blocks
        if blocks.total >= num_blocks and not is_check and not may_fit:
            return "nothing_to_free"
        crossing = ceil(num_prompt_tokens / self.block_size) + blocks.total
        if self.prefill_blocks is None and not self.fits(crossing):
            return "no_room"
        return None

    def wanted_ratio(self, options: RequestOptions) -> float:
        """The keep ratio of a request: its own, or the server's."""
        return self.keep_ratio if options.keep_ratio is None else options.keep_ratio

    def wanted_loss(self, options: RequestOptions) -> float | None:
        """The quality loss of a request: its own, or the server's; None without one."""
        if self.quality_loss is None or options.quality_loss is None:
            return self.quality_loss
        return options.quality_loss or None

    def terms(self, options: RequestOptions) -> tuple[float, float | None]:
        """On which terms a request is compressed; see :attr:`PrefixPlan.terms`."""
        return self.wanted_ratio(options), self.wanted_loss(options)

    def fits_uncompressed(self, num_tokens: int) -> bool:
        """Whether the pool can hold ``num_tokens`` tokens of one request uncompressed.

        Only with a prefill budget can a request that is longer have been admitted.
        """
        if self.prefill_blocks is None or self.pool_blocks is None:
            return True
        return num_tokens <= (self.pool_blocks - 1) * self.block_size  # without the null block

    def _protected_in_prefix(self, boundary_tokens: int) -> tuple[int, int]:
        """Protected tokens of a prefix of ``boundary_tokens`` tokens: (first ones, last ones)."""
        num_sinks = min(self.sink_tokens, boundary_tokens)
        return num_sinks, min(self.recent_tokens, boundary_tokens - num_sinks)

    def max_compressed_blocks(self, max_tokens: int) -> int:
        """The most compressed blocks of a prompt of up to ``max_tokens``, at the server's ratio."""
        return _most_compressed_blocks(self, max_tokens // self.block_size)

    def _plan_of(
        self, num_prefix_blocks: int, blocks: TierBlocks, options: RequestOptions
    ) -> PrefixPlan:
        """The plan for a raw prefix that is compressed as soon as it has been computed."""
        boundary = num_prefix_blocks * self.block_size
        num_sinks, num_recent = self._protected_in_prefix(boundary)
        plan = PrefixPlan(
            boundary_tokens=boundary,
            num_prefix_blocks=num_prefix_blocks,
            num_compressed_blocks=blocks.total,
            ready_tokens=boundary,
            keep_ratio=self.wanted_ratio(options),
            num_sink_tokens=num_sinks,
            num_recent_tokens=num_recent,
            min_pages_per_head=pages_for(
                num_sinks + num_recent, self.block_size // self.pages_per_head
            ),
            pages_per_head=self.pages_per_head,
        )
        return with_blocks(plan, blocks, self.tiers, self.pages_per_head)

    def _later_plan(self, plan: PrefixPlan, budget: int, done: PrefixPlan | None) -> PrefixPlan:
        """A plan with its tiers, where what an earlier compression kept competes."""
        plan = plan if done is None else following(plan, done)
        if self.tiers is None or (done is None and not plan.is_round):
            return plan
        blocks, competing = blocks_of_later(self.tiers, plan, budget, done)
        plan = with_blocks(plan, blocks, self.tiers, self.pages_per_head)
        return replace(plan, num_candidate_tokens=competing)

    def _num_prefix_blocks(self, num_prompt_tokens: int, options: RequestOptions) -> int:
        end = num_prompt_tokens if options.context_tokens is None else options.context_tokens
        return min(end, num_prompt_tokens) // self.block_size

    def _compressed_blocks(self, num_blocks: int, options: RequestOptions) -> TierBlocks:
        tiers = self.tiers or TierRule("evict", self.block_size)
        num_protected = sum(self._protected_in_prefix(num_blocks * self.block_size))
        blocks = tiers.blocks(self.wanted_ratio(options), num_blocks, num_protected)
        if self.prefill_blocks is None:
            return replace(blocks, dense=self._dense_blocks(num_blocks, blocks.total))
        if blocks.total <= self.prefill_blocks:
            return blocks
        return blocks_within(self.prefill_blocks, num_blocks, tiers, num_protected)

    def _dense_blocks(self, num_blocks: int, num_compressed: int) -> int:
        """Blocks that must be added so that some layers keep every KV pair.

        Head pages of all layers are dealt out together. So what these layers keep beyond their part
        of the compressed blocks is spread over all layers' parts of the added ones.

        Args:
            num_blocks: before compression.
            num_compressed: that the other layers need.
        """
        beyond = max(0, num_blocks - num_compressed) * self.num_dense_layers
        return ceil(beyond / self.num_layers)


@functools.lru_cache(maxsize=8)
def _most_compressed_blocks(rule: PrefixRule, num_blocks: int) -> int:
    """The most compressed blocks that any prefix of up to ``num_blocks`` blocks needs.

    With two tiers a shorter prefix can need more than a longer one, where its protected tokens need
    ordinary pages.
    """
    mixed = rule.tiers is not None and rule.tiers.mode == "mixed"
    lengths = range(1 if mixed else num_blocks, num_blocks + 1)
    found = (rule._compressed_blocks(length, request_options.DEFAULT).total for length in lengths)
    return max(found, default=0)
