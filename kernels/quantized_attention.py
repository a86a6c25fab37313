"""The quantized tier of a compressed prefix: attention over its tokens, tile by tile.

Tiles of bytes are decoded where they are used and multiplied in the dtype of the queries. Rotated
pages keep keys and values rotated: queries are rotated once before the first tile, so that their
products with keys are the same, and the weighted sum of values is rotated back once after the last.
Keys lack their mean, and their channels are scaled: queries are scaled the other way before they
are rotated, and their products with the mean go to the logits, once a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from .online_softmax import cap_logits, weigh_tile
from .page_tables import find_quantized_pages
from .quantized_tiles import load_functions, page_constants

if TYPE_CHECKING:
    import torch

    from .page_tables import PageTables
    from .quantized_tiles import PageLayout


STAGES = tl.constexpr(5)
"""Of the pipeline over tiles, which are small: two are on their way while one is worked on."""


@dataclass(frozen=True)
class QuantizedPages:
    """How the pages of the quantized tier are read.

    Attributes:
        pages: uint8 ``[P * S, page_bytes]``, the pool as bytes, rows contiguous, 16 bytes aligned.
        layout: of a page.
        code_book: float16, of the formats that have one; where the pages are.
        rotation: ``[D, D]``, contiguous, in the dtype of the model: orthonormal, and the pages
            hold ``keys @ rotation.T`` and ``values @ rotation.T``, with the keys' mean and scale
            taken off before. None: without rotation.
    """

    pages: torch.Tensor
    layout: PageLayout
    code_book: torch.Tensor | None = None
    rotation: torch.Tensor | None = None

    def check(self, head_dim: int, dtype: torch.dtype) -> None:
        """Refuse what the kernel would read wrongly.

        Args:
            head_dim: of the queries.
            dtype: in which is computed.

        Raises:
            ValueError: if the pages are not of the layout, or the layout or the rotation does not
                suit the queries.
        """
        layout = self.layout
        if layout.head_dim != head_dim:
            raise ValueError(f"pages of head size {layout.head_dim}, queries of {head_dim}")
        if self.pages.shape[1] != layout.page_bytes or self.pages.stride(1) != 1:
            raise ValueError(f"pages must be contiguous rows of {layout.page_bytes} bytes")
        if self.pages.stride(0) % 16:
            raise ValueError("pages must be 16 bytes aligned")
        rotation = self.rotation
        if rotation is not None and not (
            rotation.shape == (head_dim, head_dim)
            and rotation.dtype is dtype
            and rotation.is_contiguous()
        ):
            raise ValueError(f"the rotation must be contiguous {dtype} [{head_dim}] * 2")


def tier_arguments(
    quantized: QuantizedPages | None, tables: PageTables, tokens: int
) -> dict[str, Any]:
    """What ``attend_runs`` takes for the quantized tier; nothing when there is none."""
    if quantized is None:
        return {}
    constants = page_constants(quantized.layout)
    book = quantized.pages if quantized.code_book is None else quantized.code_book
    return {
        "quantized_offsets": tables.quantized_offsets,
        "key_transforms": tables.key_transforms,
        "SPLIT": tables.split,
        "FIRST": 0 if tables.key_transforms is None else tables.key_transforms.shape[2] - 2,
        "quantized_pages": quantized.pages,
        "code_book": book,
        "rotation": quantized.rotation,
        "quantized_stride": quantized.pages.stride(0),
        "Q": constants["N"],
        "QUANTIZED_TOKENS": tokens,
        **load_functions(quantized.layout),
        **{name: value for name, value in constants.items() if name.startswith(("KEY_", "VALUE_"))},
    }


@triton.jit
def rotate_rows(
    x, rotation, BACK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``x @ rotation.T``, or ``x @ rotation`` back: float32 ``[ROWS, D_PADDED]``, like ``x``."""
    WIDTH: tl.constexpr = D_PADDED if D_PADDED <= 128 else 32  # all at once takes D * D registers
    columns = tl.arange(0, D_PADDED)[None, :]
    result = tl.zeros(x.shape, tl.float32)
    for chunk in tl.range(D_PADDED // WIDTH, num_stages=1):
        rows = chunk * WIDTH + tl.arange(0, WIDTH)[:, None]
        place = rows * D + columns if BACK else rows + columns * D
        matrix = tl.load(rotation + place, mask=(rows < D) & (columns < D), other=0.0)
        if UPCAST:
            matrix = matrix.to(tl.float32)
        part = x.to(matrix.dtype)
        if WIDTH < D_PADDED:
            parts = tl.reshape(part, (x.shape[0], D_PADDED // WIDTH, WIDTH))
            of_chunk = tl.arange(0, D_PADDED // WIDTH)[None, :, None] == chunk
            part = tl.sum(tl.where(of_chunk, parts, 0.0), 1)
        result += tl.dot(part.to(matrix.dtype), matrix, input_precision=PRECISION)
    return result


@triton.jit
def attend_quantized(
    q, best, total, acc, start, end, begin, key_transform,
    quantized_pages, quantized_stride, code_book, rotation, table_row, first_page, layer_stride,
    block_stride, log2_scale, log2_cap,
    HEADS: tl.constexpr, PAIRS: tl.constexpr, PER_HEAD: tl.constexpr, D: tl.constexpr,
    D_PADDED: tl.constexpr, TOKENS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    Q: tl.constexpr, SPLIT: tl.constexpr, FIRST: tl.constexpr,
    KEY_LOAD: tl.constexpr, KEY_CODES: tl.constexpr,
    KEY_GROUP: tl.constexpr, KEY_SCALES: tl.constexpr, KEY_BLOCK: tl.constexpr,
    VALUE_LOAD: tl.constexpr, VALUE_CODES: tl.constexpr,
    VALUE_GROUP: tl.constexpr, VALUE_SCALES: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantized tokens ``start`` to ``end`` of a KV head, one at least; every row sees all of them.

    ``q`` ``[ROWS, D_PADDED]``; ``key_transform`` points to mean, scale and first keys of the head.
    ``acc`` must be zero, as it is rotated back. Returns ``best``, ``total`` and ``acc``, see
    :func:`weigh_tile`.
    """
    dims = tl.arange(0, D_PADDED)
    mean = tl.load(key_transform + dims, mask=dims < D, other=0.0)
    factor = tl.load(key_transform + D + dims, mask=dims < D, other=0.0)
    wide = q.to(tl.float32)
    offset = tl.sum(wide * mean[None, :], 1)
    turned = (wide * factor[None, :]).to(q.dtype)
    if rotation is not None:
        turned = rotate_rows(turned, rotation, False, D, D_PADDED, UPCAST, PRECISION).to(q.dtype)
    for position in tl.range(start, end, TOKENS, num_stages=STAGES):
        tokens = position + tl.arange(0, TOKENS)
        wanted = tokens < end
        page = find_quantized_pages(
            tokens // Q, wanted, begin, table_row, first_page, layer_stride, block_stride,
            HEADS, PAIRS, PER_HEAD, SPLIT,
        )  # fmt: skip
        in_page = tokens % Q
        k = KEY_LOAD(
            quantized_pages, page, quantized_stride, in_page, wanted, code_book,
            KEY_CODES, KEY_GROUP, KEY_SCALES, KEY_BLOCK, D, D_PADDED,
        ).to(q.dtype)  # fmt: skip
        v = VALUE_LOAD(
            quantized_pages, page, quantized_stride, in_page, wanted, code_book,
            VALUE_CODES, VALUE_GROUP, VALUE_SCALES, VALUE_BLOCK,
            D, D_PADDED,
        ).to(q.dtype)  # fmt: skip
        logits = tl.dot(turned, tl.trans(k), input_precision=PRECISION) + offset[:, None]
        if FIRST > 0:
            if position < FIRST:  # of the first run alone
                for number in tl.static_range(FIRST):
                    row = key_transform + (2 + number) * D
                    own = tl.load(row + dims, mask=dims < D, other=0.0) - mean
                    more = tl.sum(wide * own[None, :], 1)
                    logits += tl.where((tokens == number)[None, :], more[:, None], 0.0)
        logits = cap_logits(logits * log2_scale, log2_cap)
        logits = tl.where(wanted[None, :], logits, float("-inf"))
        best, total, acc, weights = weigh_tile(best, total, acc, logits)
        acc += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    if rotation is not None:
        mean = acc / total[:, None]  # the sum itself may be more than a float16 holds
        acc = rotate_rows(mean, rotation, True, D, D_PADDED, UPCAST, PRECISION) * total[:, None]
    return best, total, acc
