"""How many blocks a compressed prefix takes: the plugin's formulas, written down once more.

From the bytes up, in whole numbers and fractions, and with nothing taken from the plugin: a mistake
in its own formulas must not hide itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import Any

LEAST_IN_PART = 16  # tokens in each part of a head page that is cut


@dataclass(frozen=True)
class TokenBytes:
    """What one token's key, or value, takes in a quantized page.

    Attributes:
        codes: bytes of its codes.
        scales: bytes of its scales.
        of_page: bytes that a page has once, for all of its keys or all of its values.
    """

    codes: int
    scales: int
    of_page: int


def token_bytes(name: str, head_dim: int) -> TokenBytes:
    """Of a format, as docs/quantized_pages.md describes it.

    Args:
        name: ``nf4``, ``int4`` or ``int8``.
        head_dim: values of a vector.
    """
    if name == "int8":  # a byte a value, and a bfloat16 scale for the vector
        return TokenBytes(head_dim, 2, 0)
    # Half a byte a value. Scales are of blocks: of one byte and a float32 of the page for all of
    # them, or of two bytes with a zero point of as many.
    longest, of_block, of_page = (32, 1, 4) if name == "nf4" else (64, 4, 0)
    block = next(size for size in (longest, longest // 2, 16) if head_dim % size == 0)
    return TokenBytes(head_dim // 2, head_dim // block * of_block, of_page)


def quantized_tokens(name: str, page_bytes: int, head_dim: int) -> int:
    """Tokens that one head page holds when keys and values are quantized.

    The page is cut into as many equal parts as leave 16 tokens to each of them and lose a
    sixteenth of the tokens at most.

    Args:
        name: of the format, of keys and values.
        page_bytes: of a head page.
        head_dim: values of a vector.
    """
    one = token_bytes(name, head_dim)
    whole = _tokens_of_part(one, page_bytes)
    held, parts = whole, 2
    while page_bytes % (16 * parts) == 0:
        tokens = _tokens_of_part(one, page_bytes // parts)
        if tokens < LEAST_IN_PART or whole < LEAST_IN_PART * parts:
            break
        if 16 * parts * tokens >= 15 * whole:
            held = parts * tokens
        parts *= 2
    return held


def _tokens_of_part(one: TokenBytes, part_bytes: int) -> int:
    """The most that fit, in a round number if that costs no more than a sixteenth of them."""
    tokens = part_bytes // (2 * (one.codes + one.scales))
    while _size(one, tokens) > part_bytes:
        tokens -= 1
    return next(tokens - tokens % by for by in (8, 4, 2, 1) if 16 * (tokens % by) <= tokens)


def _size(one: TokenBytes, tokens: int) -> int:
    """Bytes of so many tokens: codes start at multiples of 16, scales at multiples of 4."""
    codes = ceil(tokens * one.codes / 16) * 16
    scales = ceil((one.of_page + tokens * one.scales) / 4) * 4
    return 2 * (codes + scales)


@dataclass(frozen=True)
class HeldBlocks:
    """What the engine's settings make of a prefix.

    Attributes:
        keep_ratio: of requests that name none; of bytes in mode ``mixed``, else of KV pairs.
        protected_tokens: sink and recent tokens together.
        block_size: tokens of a block.
        mode: of the plugin.
        quantized: tokens of a head page in the quantized tier; mode ``quantize``.
        prefill_blocks: the prefill budget, if there is one.
        min_prompt_tokens: shorter prompts and contexts are left alone.
    """

    keep_ratio: float
    protected_tokens: int
    block_size: int
    mode: str = "evict"
    quantized: int = 0
    prefill_blocks: int | None = None
    min_prompt_tokens: int = 256

    def kept(self, num_blocks: int, ratio: float) -> int:
        """Blocks of the compressed form of a prefix.

        Args:
            num_blocks: of the prefix.
            ratio: the request's keep ratio.
        """
        exact, size = Fraction(str(ratio)), self.block_size
        protected = min(self.protected_tokens, num_blocks * size)
        if self.mode == "quantize":
            tokens = max(ceil(exact * num_blocks * size), protected, 1)
            return ceil(Fraction(tokens, self.quantized))
        kept = max(ceil(exact * num_blocks), ceil(protected / size), 1)
        return kept if self.prefill_blocks is None else min(kept, self.prefill_blocks)

    def prefix_blocks(
        self, num_prompt_tokens: int, options: dict[str, Any], pool_blocks: int
    ) -> int | None:
        """How many blocks of a prompt must be compressed; None if it is left alone.

        Args:
            num_prompt_tokens: length of the prompt.
            options: the request's ``kvzip*`` options.
            pool_blocks: of the pool that prompt and compressed prefix must fit into, vLLM's null
                block not counted.
        """
        end = options.get("kvzip_context_tokens", num_prompt_tokens)
        blocks = end // self.block_size
        is_off = options.get("kvzip") == "off" or "kvzip_left_alone" in options
        if is_off or end < self.min_prompt_tokens or not blocks:
            return None
        ratio = options.get("kvzip_keep_ratio", self.keep_ratio)
        kept = self.kept(blocks, ratio)
        is_check = self.mode == "evict" and ratio == self.keep_ratio == 1
        if kept >= blocks and not is_check:
            return None
        fits = ceil(num_prompt_tokens / self.block_size) + kept < pool_blocks
        return blocks if fits else None
