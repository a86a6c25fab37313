"""From names of formats to how the quantized pages of one cache are filled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm_kvzip.quantization.layout import CODE_ALIGNMENT, ROUNDING_LOSS, PageLayout
from vllm_kvzip.quantization.pages import pack_pages, unpack_pages
from vllm_kvzip.quantization.rotation import (
    check_rotation,
    has_rotation,
    rotate,
    rotate_back,
)
from vllm_kvzip.registry import FORMATS

if TYPE_CHECKING:
    from vllm_kvzip.config import Rotation
    from vllm_kvzip.quantization.base import Format

LEAST_PAGE_TOKENS = 16
"""Of a quantized page that shares its head page with others."""


def available_formats() -> tuple[str, ...]:
    """Names of all formats, those of other packages included."""
    return FORMATS.names()


def create_format(name: str, head_dim: int) -> Format:
    """A format for vectors of ``head_dim`` values.

    Raises:
        ValueError: if there is none of that name, or none of its block sizes suits the head size.
    """
    found: type[Format] = FORMATS.find(name)
    return found.for_head_size(head_dim)


@dataclass(frozen=True)
class Quantization:
    """How the pages of the quantized tier are written.

    A head page is cut into equal quantized pages, so that one holds about as many tokens as an
    ordinary page: heads can then differ in how many they keep even when there are few bytes.
    Quantized page ``k`` of head page ``i`` has the id ``i * split + k`` in :meth:`pages_of`.

    Attributes:
        layout: of a quantized page.
        split: quantized pages of a head page.
        rotated: whether keys and values are rotated first.
    """

    layout: PageLayout
    split: int
    rotated: bool

    @property
    def head_page_tokens(self) -> int:
        """Tokens that a head page holds quantized."""
        return self.split * self.layout.page_tokens

    def pages_of(self, head_pages: torch.Tensor) -> torch.Tensor:
        """A pool of head pages as quantized ones, without a copy.

        Args:
            head_pages: ``[P, ...]``, contiguous, of any dtype.

        Returns:
            uint8 ``[P * split, page_bytes]``.
        """
        return head_pages.view(torch.uint8).view(-1, self.layout.page_bytes)

    def page_ids(self, head_page_ids: torch.Tensor) -> torch.Tensor:
        """The quantized pages of some head pages, int64 ``[n * split]``, in order.

        Args:
            head_page_ids: int64 ``[n]``.
        """
        parts = torch.arange(self.split, device=head_page_ids.device)
        return (head_page_ids[:, None] * self.split + parts).flatten()

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Quantize tokens that fill whole pages.

        Args:
            keys, values: float32 ``[n, Q, D]``.

        Returns:
            uint8 ``[n, page_bytes]``.
        """
        return self.encode(self.turn(keys), self.turn(values))

    def encode(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As :meth:`pack`, of tokens that have been turned."""
        return pack_pages(keys.flatten(0, 1), values.flatten(0, 1), self.layout)

    def decode(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as :meth:`encode` takes them, float32 ``[n, Q, D]``.

        Args:
            pages: uint8 ``[n, page_bytes]``.
        """
        shape = (len(pages), self.layout.page_tokens, self.layout.head_dim)
        keys, values = (half.view(shape) for half in unpack_pages(pages, self.layout))
        return keys, values

    def turn(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors ``[..., D]`` as pages hold them."""
        return rotate(vectors) if self.rotated else vectors

    def turn_back(self, vectors: torch.Tensor) -> torch.Tensor:
        """Undo :meth:`turn`."""
        return rotate_back(vectors) if self.rotated else vectors

    @property
    def code_book(self) -> torch.Tensor | None:
        """What kernels look codes up in, float16 on the CPU; None when none is used."""
        books = (half.format.code_book for half in (self.layout.keys, self.layout.values))
        return next((book for book in books if book is not None), None)


def choose_quantization(
    *, page_bytes: int, head_dim: int, keys: str, values: str, rotation: Rotation
) -> Quantization:
    """Formats, layout and rotation for the pages of one cache.

    Args:
        page_bytes: of a head page.
        head_dim: D.
        keys, values: names of the formats.
        rotation: ``auto`` rotates where the head size has a Hadamard matrix.

    Raises:
        ValueError: if a format or the rotation does not suit the head size, or the page is too
            small.
    """
    formats = create_format(keys, head_dim), create_format(values, head_dim)
    layout = PageLayout(page_bytes, head_dim, *formats)
    if rotation == "hadamard":
        check_rotation(head_dim)
    split = choose_split(layout)
    rotated = rotation != "none" and has_rotation(head_dim)
    return Quantization(layout.part(split), split, rotated)


def choose_split(whole: PageLayout) -> int:
    """Into how many equal quantized pages a head page is cut: a power of two.

    As many as leave each one :data:`LEAST_PAGE_TOKENS`, and the head page all but a few of the
    tokens that it holds in one piece.

    Args:
        whole: of a head page in one piece.
    """
    split = best = 1
    while whole.page_bytes % (2 * split * CODE_ALIGNMENT) == 0:
        split *= 2
        if whole.page_tokens < split * LEAST_PAGE_TOKENS:
            break
        tokens = whole.part(split).page_tokens
        if tokens < LEAST_PAGE_TOKENS:
            break
        if split * tokens >= (1 - ROUNDING_LOSS) * whole.page_tokens:
            best = split
    return best
