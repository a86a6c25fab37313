"""Scheduler side: which cached prefix, raw or compressed, a request starts from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip.planning.request_options import options_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.planning.prefix_rule import PrefixRule
    from vllm_kvzip.planning.reconstruction import RepeatRule
    from vllm_kvzip.planning.request_options import RequestOptions
    from vllm_kvzip.planning.reuse_rule import ReuseRule
    from vllm_kvzip.vllm_bridge.scheduler.other_groups import OtherGroups
    from vllm_kvzip.vllm_bridge.scheduler.prefix_cache import CompressedPrefixCache
    from vllm_kvzip.vllm_bridge.scheduler.row_state import PrefixRun
    from vllm_kvzip.vllm_bridge.symbols import KVCacheBlock, Request


@dataclass(frozen=True)
class Hit:
    """A cached compressed prefix that a request starts from.

    Attributes:
        run: what its row begins with.
        blocks: of the folded row, as far as it is cached.
        of_others: blocks of the groups that are not compressed, by group; as many.
        num_lagging_tokens: cached after these blocks in the compressed group, and in no other.
    """

    run: PrefixRun
    blocks: list[KVCacheBlock]
    of_others: dict[int, list[KVCacheBlock]]
    num_lagging_tokens: int


class PrefixLookup:
    """Chooses between the raw prefix that vLLM found and a compressed prefix.

    Args:
        prefixes: cached compressed prefixes.
        rule: what is compressed.
        reuse: which prefix is preferred.
        others: KV cache groups that are not compressed.
        null_block: vLLM's; it fills a folded row between compressed blocks and dense tail.
        repeat: how the model repeats contexts; None where it does not.
    """

    def __init__(
        self,
        prefixes: CompressedPrefixCache,
        rule: PrefixRule,
        reuse: ReuseRule,
        others: OtherGroups,
        null_block: KVCacheBlock,
        repeat: RepeatRule | None = None,
    ) -> None:
        self._prefixes = prefixes
        self._rule = rule
        self._reuse = reuse
        self._others = others
        self._null_block = null_block
        self._repeat = repeat

    def most_raw_tokens(self, request: Request, max_length: int) -> int:
        """How many tokens a request may take from the raw prefix cache.

        With a prefill budget, the raw prefix must end before the first round, and before the
        tokens whose queries a scorer wants for it, so that equal prefixes are compressed equally.
        Where the model repeats the context in several chunks, the request waits one token before
        the context's end until they are repeated; it must have a token to compute before it waits.
        Where layers have a sliding window, whatever it takes must not end behind the context: the
        windows then see its end.

        Args:
            request: it looks for a cached prefix.
            max_length: the most tokens that vLLM allows.
        """
        asked = options(request)
        if asked.is_off:
            return max_length
        before_round = max(1, self._reuse.round_observation_tokens)
        if (first := self._rule.first_round_tokens) is not None:
            return max(0, min(max_length, first - before_round))
        if self._rule.decode_blocks is not None:
            plan = self._rule.next_plan(request.num_prompt_tokens, asked)
            if plan is not None and plan.is_round:
                return max(0, min(max_length, plan.boundary_tokens - before_round))
        if self._repeat is not None:
            plan = self._rule.plan(request.num_prompt_tokens, asked)
            if plan is not None and plan.boundary_tokens > self._repeat.chunk_tokens:
                return min(max_length, plan.ready_tokens - 2)
            if plan is not None and self._others.all_managers():
                return min(max_length, plan.boundary_tokens)
        return max_length

    def find(
        self,
        request: Request,
        block_hashes: Sequence[Any],
        max_length: int,
        raw_tokens: int,
        drops_last: bool = False,
    ) -> Hit | None:
        """The compressed prefix that a request starts from.

        Args:
            request: it looks for a cached prefix.
            block_hashes: vLLM's hashes of its blocks.
            max_length: the most tokens that may be found.
            raw_tokens: tokens that vLLM found in the raw prefix cache.
            drops_last: whether the last dense block that is found must be computed anew. A
                compressed prefix is never cut: only guesses depend on it.

        Returns:
            None when the raw prefix is better.
        """
        asked = options(request)
        if not len(self._prefixes) or asked.is_off:
            return None
        block_size = self._rule.block_size
        max_blocks = max_length // block_size
        terms = self._rule.terms(asked)
        run = self._prefixes.find(
            block_hashes, max_blocks, terms, lambda plan: self._accepts(request, plan)
        )
        if run is None:
            return None
        following = self._rule.next_plan(request.num_prompt_tokens, asked, run.plan)
        if following is not None:  # a step must come before the next compression
            max_blocks = min(max_blocks, following.num_prefix_blocks - 1)
        tail = self._prefixes.cached_tail(run, block_hashes, max_blocks)
        if drops_last:
            tail = tail[:-1]
        longest = run.plan.num_prefix_blocks + len(tail)
        served = self._others.serve(run, block_hashes, longest)
        if served is None:
            return None
        num_blocks, of_others = served
        folded = [*run.blocks, *[self._null_block] * run.plan.num_saved_blocks, *tail]
        num_tokens = num_blocks * block_size
        gain = raw_tokens - num_tokens
        if asked.context_tokens is not None:
            # Only tokens of the declared context count. What follows it is short and seldom
            # cached: it must not keep a request from sharing the compressed context.
            end = asked.context_tokens // block_size * block_size
            gain = min(raw_tokens, end) - min(num_tokens, end)
        if gain > 0 or (gain == 0 and self._reuse.prefer_raw):
            return None
        return Hit(run, folded[:num_blocks], of_others, (longest - num_blocks) * block_size)

    def shared_hash(self, request: Request, plan: PrefixPlan, raw_tokens: int) -> bytes | None:
        """vLLM's hash of the tokens before the boundary; None when the prefix is not reusable.

        Args:
            request: its prompt is compressed.
            plan: how it is compressed.
            raw_tokens: tokens of the prompt that were found in the raw prefix cache.
        """
        if plan.is_round:
            return None
        if window := self._reuse.observation_tokens:
            # The scorer must have seen the last queries of the context, and no later ones.
            is_declared = options(request).context_tokens is not None
            if not is_declared or raw_tokens > plan.boundary_tokens - window:
                return None
        hashes: list[bytes] = request.block_hashes
        return hashes[plan.num_prefix_blocks - 1] if len(hashes) >= plan.num_prefix_blocks else None

    def _accepts(self, request: Request, plan: PrefixPlan) -> bool:
        """Whether a request may start from a compressed prefix with that plan.

        A request that declares its context takes a prefix of exactly that length. Any other request
        refuses a prefix if the rest of its prompt, which would stay dense, is longer than the
        prefix and long enough to be compressed: its whole prompt is compressed anew then.
        """
        context = options(request).context_tokens
        if context is not None:
            return bool(plan.num_prefix_blocks == context // self._rule.block_size)
        rest = request.num_prompt_tokens - plan.boundary_tokens
        return rest <= max(plan.boundary_tokens, self._rule.min_prompt_tokens)


def options(request: Request) -> RequestOptions:
    """What a request asks for."""
    return options_of(request.sampling_params)
