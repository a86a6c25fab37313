"""Random batches over head pages, for checking and timing kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import vllm_kvzip

# Where the package is not installed (a machine with torch and Triton alone), its kernels lie here.
if str(Path(__file__).parent.parent) not in vllm_kvzip.__path__:
    vllm_kvzip.__path__.append(str(Path(__file__).parent.parent))

from vllm_kvzip.kernels.page_tables import PagePlace, PageTables
from vllm_kvzip.kernels.reference import pages_of

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Shape:
    """L, H, G, D, N of a case."""

    num_layers: int = 1
    num_kv_heads: int = 2
    group_size: int = 4
    head_dim: int = 64
    page_tokens: int = 16


@dataclass(frozen=True)
class Asked:
    """One request: its length, query tokens, blocks before its boundary, and share kept of them.

    ``keep_ratio`` None: no compressed prefix.
    """

    seq_len: int
    query_len: int = 1
    boundary_blocks: int = 0
    keep_ratio: float | None = None


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

    def as_float64(self) -> Case:
        """The same on the CPU, for references."""
        moved = {
            name: getattr(self.tables, name).cpu()
            for name in ("offsets", "boundary_blocks", "slots", "block_table", "seq_lens")
        }
        return replace(
            self,
            query=self.query.cpu().double(),
            key_pages=self.key_pages.cpu().double(),
            value_pages=self.value_pages.cpu().double(),
            query_start_loc=self.query_start_loc.cpu(),
            tables=replace(self.tables, **moved),
        )


def kept_pages(asked: Asked, shape: Shape, generator: torch.Generator) -> torch.Tensor:
    """Pages of each head, int64 ``[L, H]``: uneven, with the wanted mean as far as it goes."""
    size = (shape.num_layers, shape.num_kv_heads)
    whole = asked.boundary_blocks
    if asked.keep_ratio is None or not whole:
        return torch.zeros(size, dtype=torch.int64)
    if asked.keep_ratio >= 1:
        return torch.full(size, whole)
    total = max(1, round(asked.keep_ratio * whole * shape.num_layers * shape.num_kv_heads))
    weight = torch.rand(size, generator=generator).square() + 0.05
    pages = (weight / weight.sum() * total).floor().long().clamp(0, whole)
    flat = pages.view(-1)
    for index in torch.randperm(flat.numel(), generator=generator).tolist():
        flat[index] += max(0, min(whole - int(flat[index]), total - int(flat.sum())))
    return pages


def make_case(
    requests: Sequence[Asked],
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    poison: bool = False,
) -> Case:
    """A batch whose blocks and head pages lie anywhere in the pool.

    Args:
        requests: the batch.
        shape: of the model.
        dtype: of queries and pages.
        device: where tensors go.
        seed: of everything.
        poison: what no request holds is NaN, the rest of a last page too.
    """
    generator = torch.Generator().manual_seed(seed)
    page_tokens, per_block = shape.page_tokens, shape.num_layers * shape.num_kv_heads
    kept = [kept_pages(asked, shape, generator) for asked in requests]
    tails = [-(-a.seq_len // page_tokens) - a.boundary_blocks for a in requests]
    dealt = [-(-int(pages.sum()) // per_block) for pages in kept]
    num_blocks = 1 + sum(tails) + sum(dealt)
    place = PagePlace(num_blocks * shape.num_kv_heads, shape.num_kv_heads)
    free = (1 + torch.randperm(num_blocks - 1, generator=generator)).split(
        [count for pair in zip(tails, dealt, strict=True) for count in pair]
    )
    width = 1 + max(
        asked.boundary_blocks + tail for asked, tail in zip(requests, tails, strict=True)
    )
    block_table = torch.zeros(len(requests), width, dtype=torch.int32)
    slots = torch.randperm(len(requests) + 2, generator=generator)[: len(requests)]
    offsets = torch.zeros(len(requests) + 2, per_block + 1, dtype=torch.int32)
    boundaries = torch.zeros(len(requests) + 2, dtype=torch.int32)
    for row, asked in enumerate(requests):
        tail, blocks = free[2 * row], free[2 * row + 1]
        block_table[row, : len(blocks)] = blocks.int()
        block_table[row, asked.boundary_blocks :][: len(tail)] = tail.int()
        offsets[slots[row], 1:] = kept[row].flatten().cumsum(0).int()
        boundaries[slots[row]] = asked.boundary_blocks
    lens = torch.tensor([asked.seq_len for asked in requests], dtype=torch.int32)
    tables = PageTables(
        offsets=offsets.to(device), boundary_blocks=boundaries.to(device),
        slots=slots.int().to(device), block_table=block_table.to(device), seq_lens=lens.to(device),
        place=place, num_kv_heads=shape.num_kv_heads, page_tokens=page_tokens,
    )  # fmt: skip
    lengths = torch.tensor([asked.query_len for asked in requests])
    starts = torch.zeros(len(requests) + 1, dtype=torch.int32)
    starts[1:] = lengths.cumsum(0)
    on_device = torch.Generator(device).manual_seed(seed)
    num_query_heads = shape.num_kv_heads * shape.group_size

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=device, generator=on_device)

    pages = random(num_blocks * per_block, page_tokens, 2 * shape.head_dim)
    if poison:
        _poison(pages, tables)
    key_pages, value_pages = pages.split(shape.head_dim, dim=-1)
    return Case(
        query=random(int(lengths.sum()), num_query_heads, shape.head_dim),
        key_pages=key_pages,
        value_pages=value_pages,
        query_start_loc=starts.to(device),
        tables=tables,
        scale=shape.head_dim**-0.5,
        max_query_len=int(lengths.max()),
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
    pages[~held.to(pages.device)] = float("nan")
