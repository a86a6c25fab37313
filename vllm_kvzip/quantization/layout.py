"""What lies where in a quantized page: the one place that computes it.

A quantized page is a head page, of ``2 * N * D * itemsize`` bytes, or an equal part of one.
It has four regions, each token after token::

    key codes | value codes | key scales | value scales

Codes begin at multiples of 16 bytes and scales at multiples of 4, so that a kernel loads them in
the widest pieces. A region of scales begins with the group scale of formats that have one. What is
left over at the end is not written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_kvzip.quantization.base import Format

CODE_ALIGNMENT, SCALE_ALIGNMENT = 16, 4  # bytes
MOST_TOKENS_TO_ROUND = 8
ROUNDING_LOSS = 1 / 16
"""Share of its tokens that a page may lose for a rounder number of them."""


@dataclass(frozen=True)
class HalfPage:
    """The keys, or the values, of a page.

    Attributes:
        format: how they are encoded.
        codes_offset: byte of the first code.
        group_offset: byte of the group scale, float32; ``scales_offset`` when there is none.
        scales_offset: byte of the first token's scales.
    """

    format: Format
    codes_offset: int
    group_offset: int
    scales_offset: int


@dataclass(frozen=True)
class PageLayout:
    """How a page of given bytes is filled.

    The number of tokens is the largest that fits, rounded down to a multiple of 8, 4 or 2 where
    that costs at most a sixteenth of them: so many neighbouring tokens then lie in one page, which
    lets a kernel load their scales together and look up their page once.

    Args:
        page_bytes: of a page, a multiple of 16.
        head_dim: D.
        key_format, value_format: how keys and values are encoded; they may differ.

    Raises:
        ValueError: if a format does not suit D, or the page holds no token, or its size is no
            multiple of 16 bytes.
    """

    page_bytes: int
    head_dim: int
    key_format: Format
    value_format: Format

    def __post_init__(self) -> None:
        for half_format in (self.key_format, self.value_format):
            half_format.block_values(self.head_dim)  # refuses head sizes
        if self.page_bytes % CODE_ALIGNMENT:
            raise ValueError(
                f"a quantized page of {self.page_bytes} bytes is no multiple of {CODE_ALIGNMENT}"
            )
        if self._ends(1)[-1] > self.page_bytes:
            raise ValueError(
                f"a page of {self.page_bytes} bytes is too small for a token of "
                f"{self.key_format.name} keys and {self.value_format.name} values of head size "
                f"{self.head_dim}, which takes {self._ends(1)[-1]}"
            )

    def _ends(self, tokens: int) -> tuple[int, int, int, int]:
        """Bytes at which the four regions of a page of ``tokens`` end, before alignment."""
        ends: list[int] = []
        end = 0
        sizes = [
            (CODE_ALIGNMENT, tokens * self.key_format.code_bytes(self.head_dim)),
            (CODE_ALIGNMENT, tokens * self.value_format.code_bytes(self.head_dim)),
        ]
        for scaled in (self.key_format, self.value_format):
            scale_bytes = tokens * scaled.scale_bytes(self.head_dim)
            sizes.append((SCALE_ALIGNMENT, scaled.group_bytes + scale_bytes))
        for alignment, size in sizes:
            end = _aligned(end, alignment) + size
            ends.append(end)
        return ends[0], ends[1], ends[2], ends[3]

    @cached_property
    def page_tokens(self) -> int:
        """Tokens of a page."""
        least = sum(f.vector_bytes(self.head_dim) for f in (self.key_format, self.value_format))
        most = self.page_bytes // least
        while self._ends(most)[-1] > self.page_bytes:
            most -= 1
        multiple = MOST_TOKENS_TO_ROUND
        while most % multiple > most * ROUNDING_LOSS:
            multiple //= 2
        return most - most % multiple

    @cached_property
    def keys(self) -> HalfPage:
        """Where the keys lie."""
        scales = _aligned(self._ends(self.page_tokens)[1], SCALE_ALIGNMENT)
        return HalfPage(self.key_format, 0, scales, scales + self.key_format.group_bytes)

    @cached_property
    def values(self) -> HalfPage:
        """Where the values lie."""
        key_codes_end, _, key_scales_end, _ = self._ends(self.page_tokens)
        codes = _aligned(key_codes_end, CODE_ALIGNMENT)
        scales = _aligned(key_scales_end, SCALE_ALIGNMENT)
        return HalfPage(self.value_format, codes, scales, scales + self.value_format.group_bytes)

    def part(self, split: int) -> PageLayout:
        """Of one of ``split`` equal parts of such a page.

        Raises:
            ValueError: if such a part cannot be laid out.
        """
        return replace(self, page_bytes=self.page_bytes // split)

    @property
    def used_bytes(self) -> int:
        """Bytes up to the end of the last region."""
        return self._ends(self.page_tokens)[-1]

    @property
    def bits_per_value(self) -> float:
        """Bits of a page over the values it holds: scales, gaps and what is left over included."""
        return 8 * self.page_bytes / (2 * self.page_tokens * self.head_dim)


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
