"""Random batches over head pages, for checking and timing kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

import gpu.clone  # noqa: F401
from vllm_kvzip.kernels.head_page_attention import head_page_attention
from vllm_kvzip.kernels.page_tables import PagePlace, PageTables
from vllm_kvzip.kernels.quantized_attention import QuantizedPages
from vllm_kvzip.kernels.reference import (
    DecodedPages,
    head_page_attention_reference,
    pages_of,
    quantized_pages_of,
)
from vllm_kvzip.quantization import PageLayout, choose_split, pack_pages, unpack_pages
from vllm_kvzip.quantization.rotation import hadamard_matrix

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.quantization import Format


@dataclass(frozen=True)
class Shape:
    """L, H, G, D, N, M of a case."""

    num_layers: int = 1
    num_kv_heads: int = 2
    group_size: int = 4
    head_dim: int = 64
    page_tokens: int = 16
    pages_per_head: int = 1

    @property
    def num_pairs(self) -> int:
        """L * H."""
        return self.num_layers * self.num_kv_heads

    @property
    def block_tokens(self) -> int:
        """Tokens of a block."""
        return self.page_tokens * self.pages_per_head

    def page_layout(
        self,
        dtype: torch.dtype,
        key_format: Format,
        value_format: Format,
        split: int | None = None,
    ) -> PageLayout:
        """Quantized pages, ``split`` of them of the bytes of another; None: as the plugin does."""
        page_bytes = 2 * self.page_tokens * self.head_dim * dtype.itemsize
        whole = PageLayout(page_bytes, self.head_dim, key_format, value_format)
        return whole.part(choose_split(whole) if split is None else split)


@dataclass(frozen=True)
class Asked:
    """One request: its length, query tokens, blocks before its boundary, and share kept of them.

    ``keep_ratio`` None: no compressed prefix. ``quantized_ratio``: mean share of the pages of those
    blocks that there are besides, quantized; uneven, and never more pages in all than the blocks
    had.
    """

    seq_len: int
    query_len: int = 1
    boundary_blocks: int = 0
    keep_ratio: float | None = None
    quantized_ratio: float = 0.0


@dataclass(frozen=True)
class Case:
    """What attention over head pages takes."""

    query: torch.Tensor
    key_pages: torch.Tensor
    value_pages: torch.Tensor
    query_start_loc: torch.Tensor
    tables: PageTables
    scale: float
    max_query_len: int
    quantized: QuantizedPages | None = None
    stored_scales: torch.Tensor | None = None
    """Of a cache of 8-bit numbers, float32 ``[L, 3, H]``."""
    dtype: torch.dtype = torch.float32
    """Of the model: that of queries and pages, where those have no 8 bits."""
    sink_logits: torch.Tensor | None = None
    """Learned by the model, ``[H * G]``."""
    soft_cap: float | None = None

    def decoded(self) -> DecodedPages | None:
        """The quantized tier in float64 on the CPU, for references."""
        if self.quantized is None:
            return None
        layout = self.quantized.layout
        size = (-1, layout.page_tokens, layout.head_dim)
        halves = unpack_pages(self.quantized.pages.cpu(), layout)
        keys, values = (half.view(size).double() for half in halves)
        rotated = self.quantized.rotation is not None
        rotation = hadamard_matrix(layout.head_dim) if rotated else None
        assert self.tables.key_transforms is not None
        return DecodedPages(keys, values, rotation, self.tables.key_transforms.cpu().double())

    def as_float64(self) -> Case:
        """The same on the CPU, for references, but for what :meth:`decoded` gives."""
        names = ["offsets", "boundary_pages", "slots", "block_table", "seq_lens"]
        if self.tables.quantized_offsets is not None:
            names += ["quantized_offsets", "key_transforms"]
        moved = {name: getattr(self.tables, name).cpu() for name in names}
        return replace(
            self,
            query=self.query.cpu().double(),
            key_pages=self.key_pages.cpu().double(),
            value_pages=self.value_pages.cpu().double(),
            query_start_loc=self.query_start_loc.cpu(),
            tables=replace(self.tables, **moved),
        )


def attend(case: Case, layer: int, **how: Any) -> torch.Tensor:
    """What the attention kernel makes of one layer, like the query; NaN where it writes nothing.

    Args:
        case: the batch.
        layer: which layer's pages.
        how: other arguments of the kernel, and other values than the case has.
    """
    arguments: dict[str, Any] = {
        "max_query_len": case.max_query_len,
        "max_tokens": int(case.tables.seq_lens.max()),
        "quantized": case.quantized,
        "output": torch.full_like(case.query, float("nan"), dtype=case.dtype),
        "stored_scales": None if case.stored_scales is None else case.stored_scales[layer],
        "sink_logits": case.sink_logits,
        "soft_cap": case.soft_cap,
    }
    return head_page_attention(
        case.query, case.key_pages, case.value_pages, case.query_start_loc, case.tables, layer,
        case.scale, **arguments | how,
    )  # fmt: skip


def attend_exactly(case: Case, layer: int) -> torch.Tensor:
    """What :func:`attend` should make of it, float64 on the CPU."""
    exact = case.as_float64()
    if case.stored_scales is not None:
        _multiply(exact, case.stored_scales[layer].cpu().double(), layer)
    return head_page_attention_reference(
        exact.query, exact.key_pages, exact.value_pages, exact.query_start_loc, exact.tables,
        layer, exact.scale, case.decoded(),
        sink_logits=None if case.sink_logits is None else case.sink_logits.cpu().double(),
        soft_cap=case.soft_cap,
    )  # fmt: skip


def _multiply(case: Case, scales: torch.Tensor, layer: int) -> None:
    """Turn what is stored of one layer into numbers, ``scales`` being ``[3, H]``."""
    of_queries, of_keys, of_values = scales
    group = case.query.shape[1] // len(of_queries)
    case.query.mul_(of_queries.repeat_interleave(group)[:, None])
    for request in range(len(case.tables.slots)):
        for head in range(case.tables.num_kv_heads):
            ids, _ = pages_of(case.tables, layer, request, head)
            case.key_pages[ids] *= of_keys[head]
            case.value_pages[ids] *= of_values[head]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """``|found - expected| / |expected|`` in float64."""
    expected = expected.double().cpu()
    return float((found.double().cpu() - expected).norm() / expected.norm())


def kept_pages(asked: Asked, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Pages of each head, int64 ``[L, H]``: uneven, with the wanted mean as far as it goes."""
    size = (shape.num_layers, shape.num_kv_heads)
    whole = asked.boundary_blocks * shape.pages_per_head
    if not asked.keep_ratio or not whole:
        return torch.zeros(size, dtype=torch.int64)
    if asked.keep_ratio >= 1:
        return torch.full(size, whole)
    total = max(1, round(asked.keep_ratio * whole * shape.num_pairs))
    weight = torch.rand(size, generator=generator).square() + 0.05
    pages = (weight / weight.sum() * total).floor().long().clamp(0, whole)
    flat = pages.view(-1)
    for index in torch.randperm(flat.numel(), generator=generator).tolist():
        flat[index] += max(0, min(whole - int(flat[index]), total - int(flat.sum())))
    return pages


def quantized_pages(
    asked: Asked, kept: torch.Tensor, shape: Shape, generator: torch.Generator
) -> torch.Tensor:
    """Quantized pages of each head, int64 ``[L, H]``; ``kept`` are the others, alike."""
    size = (shape.num_layers, shape.num_kv_heads)
    whole = asked.boundary_blocks * shape.pages_per_head
    most = 2 * asked.quantized_ratio * whole
    wanted = (torch.rand(size, generator=generator) * most).round().long()
    return wanted.minimum(whole - kept)


def make_case(
    requests: Sequence[Asked],
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    poison: bool = False,
    layout: PageLayout | None = None,
    rotated: bool = False,
    num_first: int = 4,
    eight_bits: Literal["none", "pages", "queries too"] = "none",
    sinks: bool = False,
    soft_cap: float | None = None,
) -> Case:
    """A batch whose blocks and head pages lie anywhere in the pool.

    Args:
        requests: the batch.
        shape: of the model.
        dtype: of queries and pages.
        device: where tensors go.
        seed: of everything.
        poison: what no request holds is bytes 0xFF, a NaN of any kind, the rest of a last page too.
        layout: of the pages of a quantized tier, a head page or an equal part of one; there is no
            such tier when None.
        rotated: that tier holds rotated keys and values.
        num_first: W, tokens of that tier with a mean of their own.
        eight_bits: what is stored as float8_e4m3fn, with scales of its own in each layer and head.
        sinks: query heads have learned logits.
        soft_cap: of all other logits.
    """
    generator = torch.Generator().manual_seed(seed)
    page_tokens, num_pairs, per_head = shape.page_tokens, shape.num_pairs, shape.pages_per_head
    per_block = num_pairs * per_head
    kept = [kept_pages(asked, shape, generator) for asked in requests]
    quantized = [torch.zeros_like(pages) for pages in kept]
    if layout is not None:
        quantized = [
            quantized_pages(asked, pages, shape, generator)
            for asked, pages in zip(requests, kept, strict=True)
        ]
    tails = [-(-a.seq_len // shape.block_tokens) - a.boundary_blocks for a in requests]
    split = 1
    if layout is not None:
        whole = 2 * page_tokens * shape.head_dim * (1 if eight_bits != "none" else dtype.itemsize)
        split = whole // layout.page_bytes
    dealt = [
        -(-(split * int(pages.sum()) + int(more.sum())) // (split * per_block))
        for pages, more in zip(kept, quantized, strict=True)
    ]
    num_blocks = 1 + sum(tails) + sum(dealt)
    of_layer = shape.num_kv_heads * per_head
    place = PagePlace(num_blocks * of_layer, of_layer, pages_per_head=per_head)
    free = (1 + torch.randperm(num_blocks - 1, generator=generator)).split(
        [count for pair in zip(tails, dealt, strict=True) for count in pair]
    )
    width = 1 + max(
        asked.boundary_blocks + tail for asked, tail in zip(requests, tails, strict=True)
    )
    block_table = torch.zeros(len(requests), width, dtype=torch.int32)
    slots = torch.randperm(len(requests) + 2, generator=generator)[: len(requests)]
    offsets = torch.zeros(len(requests) + 2, num_pairs + 1, dtype=torch.int32)
    quantized_offsets = torch.zeros_like(offsets)
    boundaries = torch.zeros(len(requests) + 2, dtype=torch.int32)
    for row, asked in enumerate(requests):
        tail, blocks = free[2 * row], free[2 * row + 1]
        block_table[row, : len(blocks)] = blocks.int()
        block_table[row, asked.boundary_blocks :][: len(tail)] = tail.int()
        offsets[slots[row], 1:] = kept[row].flatten().cumsum(0).int()
        quantized_offsets[slots[row]] = split * int(kept[row].sum())
        quantized_offsets[slots[row], 1:] += quantized[row].flatten().cumsum(0).int()
        boundaries[slots[row]] = asked.boundary_blocks * per_head
    transforms = torch.full((len(offsets), num_pairs, 2 + num_first, shape.head_dim), float("nan"))
    in_use = (len(slots), num_pairs, shape.head_dim)
    for row in range(2 + num_first):
        transforms[slots, :, row] = 3 * torch.randn(in_use, generator=generator)
    transforms[slots, :, 1] = 2.0 ** torch.randint(4, in_use, generator=generator)
    lens = torch.tensor([asked.seq_len for asked in requests], dtype=torch.int32)
    tables = PageTables(
        offsets=offsets.to(device), boundary_pages=boundaries.to(device),
        slots=slots.int().to(device), block_table=block_table.to(device), seq_lens=lens.to(device),
        place=place, num_kv_heads=shape.num_kv_heads, page_tokens=page_tokens,
        quantized_offsets=None if layout is None else quantized_offsets.to(device),
        key_transforms=None if layout is None else transforms.to(device), split=split,
    )  # fmt: skip
    lengths = torch.tensor([asked.query_len for asked in requests])
    starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    on_device = torch.Generator(device).manual_seed(seed)
    num_query_heads = shape.num_kv_heads * shape.group_size

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=device, generator=on_device)

    pages = random(num_blocks * per_block, page_tokens, 2 * shape.head_dim)
    query = random(int(lengths.sum()), num_query_heads, shape.head_dim)
    scales = None
    if eight_bits != "none":
        scales = 0.05 + torch.rand(shape.num_layers, 3, shape.num_kv_heads, generator=generator)
        pages = (4 * pages).to(torch.float8_e4m3fn)
        if eight_bits == "queries too":
            query = (4 * query).to(torch.float8_e4m3fn)
        else:
            scales[:, 0] = 1
        scales = scales.to(device)
    if poison:
        _poison(pages, tables)
    tier = None
    if layout is not None:
        as_bytes = pages.flatten(1).view(torch.uint8).view(-1, layout.page_bytes)
        _fill_quantized(as_bytes, tables, layout, generator)
        books = [half.format.code_book for half in (layout.keys, layout.values)]
        book = next((book.to(device) for book in books if book is not None), None)
        rotation = hadamard_matrix(shape.head_dim).to(device, dtype) if rotated else None
        tier = QuantizedPages(as_bytes, layout, book, rotation)
    key_pages, value_pages = pages.split(shape.head_dim, dim=-1)
    sink_logits = None
    if sinks:  # some count as much as all tokens of a long request, others next to nothing
        sink_logits = (4 * torch.randn(num_query_heads, generator=generator) + 3).to(device, dtype)
    return Case(
        query=query,
        key_pages=key_pages,
        value_pages=value_pages,
        query_start_loc=starts.to(device),
        tables=tables,
        scale=shape.head_dim**-0.5,
        max_query_len=int(lengths.max()),
        quantized=tier,
        stored_scales=scales,
        dtype=dtype,
        sink_logits=sink_logits,
        soft_cap=soft_cap,
    )


def _poison(pages: torch.Tensor, tables: PageTables) -> None:
    """Fill with NaN what no pair reads."""
    held = torch.zeros(pages.shape[:2], dtype=torch.bool)
    for layer in range(tables.num_layers):
        for request in range(len(tables.slots)):
            for head in range(tables.num_kv_heads):
                ids, num_tokens = pages_of(tables, layer, request, head)
                index = torch.arange(num_tokens)
                held[ids[index // tables.page_tokens], index % tables.page_tokens] = True
    as_bytes = pages.view(torch.uint8)
    as_bytes[~held.to(pages.device)] = 0xFF


def _fill_quantized(
    pages: torch.Tensor, tables: PageTables, layout: PageLayout, generator: torch.Generator
) -> None:
    """Write random tokens in the quantized pages, uint8 ``[P, page_bytes]``, and nothing else."""
    for layer in range(tables.num_layers):
        for request in range(len(tables.slots)):
            for head in range(tables.num_kv_heads):
                found = quantized_pages_of(tables, layer, request, head, layout.page_tokens)
                ids, num_tokens = found
                if not num_tokens:
                    continue
                used = ids[: -(-num_tokens // layout.page_tokens)]
                keys, values = torch.randn(2, num_tokens, layout.head_dim, generator=generator)
                packed = pack_pages(keys, values, layout).to(pages.device)
                first = torch.arange(len(used))[:, None] * layout.page_tokens
                held = (first + _token_of_bytes(layout) < num_tokens).to(pages.device)
                pages[used] = torch.where(held, packed, pages[used])


def _token_of_bytes(layout: PageLayout) -> torch.Tensor:
    """To which token of a page each byte belongs, int64 ``[page_bytes]``; far behind all if none.

    A group scale belongs to the first.
    """
    owner = torch.full((layout.page_bytes,), torch.iinfo(torch.int32).max)
    tokens = torch.arange(layout.page_tokens)
    for half in (layout.keys, layout.values):
        for start, size in (
            (half.codes_offset, half.format.code_bytes(layout.head_dim)),
            (half.scales_offset, half.format.scale_bytes(layout.head_dim)),
        ):
            owner[start : start + size * len(tokens)] = tokens.repeat_interleave(size)
        owner[half.group_offset : half.group_offset + half.format.group_bytes] = 0
    return owner
