"""Every Triton kernel against a plain reference, on a card or in Triton's interpreter."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import torch

from gpu.kernel_cases import Asked, Shape, attend, attend_exactly, make_case, relative_error
from vllm_kvzip.kernels.column_maximum import column_maximum
from vllm_kvzip.kernels.flat_tables import flatten_tables
from vllm_kvzip.kernels.page_copies import compact_pages
from vllm_kvzip.kernels.quantized_pages import dequantize_pages, quantize_pages
from vllm_kvzip.kernels.reference import (
    cap_logits_reference,
    column_maximum_reference,
    compact_pages_reference,
    flatten_tables_reference,
)
from vllm_kvzip.quantization import (
    Int4,
    Int8,
    NormalFloat4,
    PageLayout,
    pack_pages,
    unpack_pages,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HEAD_DIMS = (64, 96, 128, 256)
LIMITS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error ``|out - ref| / |ref|`` allowed."""
TIER_LIMIT = 2e-2
"""The same with a quantized tier: bfloat16 queries are rounded twice more, scaled and rotated."""


@dataclass(frozen=True)
class Check:
    """What came out of one comparison; ``fault`` says what was raised in place of it."""

    name: str
    error: float
    limit: float
    fault: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # false for NaN


def compare(name: str, limit: float, error_of: Callable[[], float]) -> Check:
    """One comparison; a kernel that does not compile or run fails this one and no other."""
    try:
        return Check(name, error_of(), limit)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["nothing said"])[-1]
        return Check(name, float("inf"), limit, f"{type(error).__name__}: {reason[:300]}")


def bitwise(name: str, is_same: Callable[[], bool]) -> Check:
    """One comparison in which nothing may differ."""
    return compare(name, 0.0, lambda: 0.0 if is_same() else float("inf"))


def attention_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Decode, several query tokens, compressed and not, over the shapes we name.

    Not every combination: each is a kernel of its own, and compiling takes a second or two.
    """
    length = 150 if small else 5000
    cuts = [(4, 16), (8, 32)] if small else [(4, 16), (1, 16), (8, 32), (4, 64), (4, 128)]
    others = [torch.float32] if small else [torch.float32, torch.float16]
    for group, page_tokens in cuts:
        shape = Shape(2, 2, group, head_dim, page_tokens)
        more = others if (group, page_tokens) == (4, 16) else []
        for dtype in (torch.bfloat16, *more):
            for query_len in (1, 4, 70) if head_dim == 128 and not small else (1, 40):
                yield check_attention(shape, dtype, query_len, length, device)
    large = Shape(2, 2, 4, head_dim, 16, 3 if small else 34)  # blocks of a model with states
    for query_len in (1, 40):
        yield check_attention(large, torch.bfloat16, query_len, length, device)


def check_attention(
    shape: Shape, dtype: torch.dtype, query_len: int, length: int, device: str
) -> Check:
    """One batch: compressed unevenly, wholly kept, not compressed, and one of other length."""
    blocks = length // shape.block_tokens
    batch = [
        Asked(length + query_len, query_len, blocks, 0.3),
        Asked(length // 2 + query_len + 3, query_len, blocks // 2, 1.0),
        Asked(length // 3 + query_len, query_len),
        Asked(query_len),
    ]
    name = (
        f"attention {str(dtype)[6:]} D{shape.head_dim} G{shape.group_size} "
        f"N{shape.page_tokens}{in_large_blocks(shape)} q{query_len}"
    )
    return compare_attention(
        name, batch, shape, dtype=dtype, device=device, seed=query_len, poison=True
    )


def in_large_blocks(shape: Shape) -> str:
    """Part of a check's name."""
    return f" in blocks of {shape.block_tokens}" if shape.pages_per_head > 1 else ""


def compare_attention(name: str, batch: list[Asked], shape: Shape, **how: Any) -> Check:
    """The attention kernel over one batch; ``how`` is of :func:`make_case`."""
    limit = LIMITS[how["dtype"]] if how.get("layout") is None else TIER_LIMIT

    def error() -> float:
        case = make_case(batch, shape, **how)
        return relative_error(attend(case, 1), attend_exactly(case, 1))

    return compare(name, limit, error)


def tier_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Attention over prefixes with a quantized tier, and one without in the same batch."""
    double = NormalFloat4(32, double_quantization=True)
    formats = ((double, double), (Int8(), Int8()), (Int8(), Int4(32)))
    blocks = 10 if small else 300
    large, small_blocks = Shape(2, 2, 4, head_dim, 16, 3), Shape(2, 2, 4, head_dim, 16)
    cases = [(small_blocks, *pair) for pair in formats[: 1 if small else None]]
    for shape, key_format, value_format in [*cases, (large, double, double)]:
        layout = shape.page_layout(torch.bfloat16, key_format, value_format)
        for query_len in (1, 40):
            tokens = shape.block_tokens * blocks + query_len
            batch = [
                Asked(tokens, query_len, blocks, 0.1, 0.3),
                Asked(tokens + 9, query_len, blocks, None, 1.0),
                Asked(90 + query_len, query_len),
            ]
            about = f"{key_format.name} {value_format.name}{in_large_blocks(shape)}"
            yield compare_attention(
                f"attention two tiers {about} D{head_dim} q{query_len}", batch, shape,
                dtype=torch.bfloat16, device=device, seed=query_len, poison=True, layout=layout,
                rotated=True,
            )  # fmt: skip


def compare_with_terms(
    what: str,
    query_len: int,
    head_dim: int,
    device: str,
    *,
    small: bool,
    two_tiers: bool,
    stored: torch.dtype = torch.bfloat16,
    **terms: Any,
) -> Check:
    """Attention of a compressed request and another one, with one tier or with two.

    Args:
        what: name of the check.
        query_len: rows of each request.
        head_dim: D.
        device: where it runs.
        small: whether the compressed request is a short one.
        two_tiers: whether it has quantized pages as well.
        stored: of the numbers in the cache.
        terms: what :func:`compare_attention` is told besides.
    """  # fmt: skip
    blocks = 10 if small else 300
    double = NormalFloat4(32, double_quantization=True)
    shape = Shape(2, 2, 4, head_dim, 16)
    layout = shape.page_layout(stored, double, double) if two_tiers else None
    batch = [
        Asked(16 * blocks + query_len, query_len, blocks, 0.1, 0.3),
        Asked(90 + query_len, query_len),
    ]
    return compare_attention(
        f"attention {what}{' two tiers' * two_tiers} D{head_dim} q{query_len}", batch, shape,
        dtype=torch.bfloat16, device=device, seed=query_len, poison=True, layout=layout,
        rotated=True, **terms,
    )  # fmt: skip


def eight_bit_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Attention over a cache of 8-bit numbers, with one tier and with two."""
    for two_tiers in (False, True):
        for query_len in (1, 40):
            yield compare_with_terms(
                "8 bits", query_len, head_dim, device, small=small, two_tiers=two_tiers,
                stored=torch.uint8, eight_bits="queries too",
            )  # fmt: skip


def sink_and_cap_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Attention with learned logits and capped ones, with one tier and with two."""
    for two_tiers in (False, True):
        for query_len, terms in ((1, "sinks cap"), (40, "sinks cap"), (1, "sinks"), (1, "cap")):
            yield compare_with_terms(
                terms, query_len, head_dim, device, small=small, two_tiers=two_tiers,
                sinks="sinks" in terms, soft_cap=2.0 if "cap" in terms else None,
            )  # fmt: skip


def compaction_inputs(
    shape: Shape, blocks: int, keep_ratio: float, dtype: torch.dtype, device: str
) -> tuple[torch.Tensor, ...]:
    """Pages, source table, positions, page heads and target pages of one request's compaction."""
    generator = torch.Generator(device).manual_seed(0)
    pairs, tokens = shape.num_layers * shape.num_kv_heads, shape.page_tokens
    kept = max(1, round(keep_ratio * blocks))
    num_pages = pairs * (blocks + kept)
    order = torch.randperm(num_pages, generator=generator, device=device).int()
    sources = order[: pairs * blocks].view(pairs, blocks)
    targets = order[pairs * blocks :]
    rank = torch.rand(pairs, blocks * tokens, generator=generator, device=device)
    positions = rank.topk(kept * tokens, dim=1).indices.sort(dim=1).values.int().flatten()
    heads = torch.arange(pairs, device=device, dtype=torch.int32).repeat_interleave(kept)
    pages = torch.randn(
        num_pages, tokens, 2 * shape.head_dim, generator=generator, device=device, dtype=dtype
    )
    return pages, sources, positions, heads, targets


def compaction_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Bit for bit."""

    def is_same(shape: Shape) -> bool:
        pages, *rest = compaction_inputs(shape, 6 if small else 40, 0.4, torch.bfloat16, device)
        expected = pages.clone()
        compact_pages(*pages.split(head_dim, dim=-1), *rest)
        compact_pages_reference(*expected.split(head_dim, dim=-1), *rest)
        return torch.equal(pages.view(torch.int16), expected.view(torch.int16))

    for page_tokens in (16, 128):
        shape = Shape(2, 3, 1, head_dim, page_tokens)
        yield bitwise(f"compaction D{head_dim} N{page_tokens}", partial(is_same, shape))


def score_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Against float64 softmaxes of what the kernel read."""
    sizes = (90, 70) if small else (2100, 513)
    scale = head_dim**-0.5

    def error(dtype: torch.dtype, soft_cap: float | None = None) -> float:
        generator = torch.Generator(device).manual_seed(head_dim)
        queries, keys = (
            torch.randn(3, n, head_dim, device=device, dtype=dtype, generator=generator)
            for n in sizes
        )
        logits = torch.bmm(queries.double(), keys.double().transpose(1, 2)) * scale
        logits = cap_logits_reference(logits, soft_cap)
        log_normaliser = logits.logsumexp(dim=-1).float()
        found = column_maximum(queries, keys, log_normaliser, scale, soft_cap)
        expected = column_maximum_reference(
            queries.double(), keys.double(), log_normaliser.double(), scale, soft_cap
        )
        return relative_error(found, expected)

    for dtype, limit in LIMITS.items():
        yield compare(f"scores {str(dtype)[6:]} D{head_dim}", limit, partial(error, dtype))
    capped = partial(error, torch.bfloat16, 2.0)
    yield compare(f"scores cap bfloat16 D{head_dim}", LIMITS[torch.bfloat16], capped)


def table_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Entry for entry."""
    yield bitwise(
        f"tables of all layers D{head_dim}", lambda: same_tables(device, head_dim, small=small)
    )


def same_tables(device: str, head_dim: int, *, small: bool) -> bool:
    """Whether the flat tables of an uneven batch are the reference's."""
    shape = Shape(3, 4, 4, head_dim, 16)
    length = 300 if small else 9000
    batch = [Asked(length, 1, length // 20, 0.3), Asked(length // 2), Asked(length, 1, 4, 1.0)]
    case = make_case(batch, shape, device=device)
    exact = case.as_float64().tables
    width = length // 16 + 2
    expected, expected_lengths = flatten_tables_reference(exact, width)
    flat = torch.zeros_like(expected).to(device)
    lengths = torch.zeros_like(expected_lengths).to(device)
    flatten_tables(case.tables, flat, lengths)
    return torch.equal(flat.cpu(), expected) and torch.equal(lengths.cpu(), expected_lengths)


def quantization_checks(device: str, head_dim: int, *, small: bool) -> Iterator[Check]:
    """Bit for bit: pages filled from scattered rows, and read back."""
    double = NormalFloat4(32, double_quantization=True)
    num_pages = 2 if small else 300

    def is_same(layout: PageLayout) -> bool:
        random = torch.Generator().manual_seed(head_dim)
        size = (num_pages * layout.page_tokens, head_dim)
        keys, values = (torch.randn(size, generator=random).bfloat16() for _ in range(2))
        expected = pack_pages(keys, values, layout)
        where = torch.randperm(len(keys), generator=random)
        scattered = [x[where.argsort()].to(device) for x in (keys, values)]  # x at row where
        ids = torch.randperm(num_pages, generator=random)
        pages = torch.zeros_like(expected, device=device)
        book = NormalFloat4.code_book.to(device)
        rows = where.view(num_pages, -1).to(device)
        quantize_pages(*scattered, rows, pages, ids.to(device), layout, book)
        read = [torch.empty(size, device=device) for _ in range(2)]
        dequantize_pages(pages, ids.to(device), *read, layout, book)
        return torch.equal(pages.cpu()[ids], expected) and all(
            torch.equal(found.cpu(), wanted)
            for found, wanted in zip(read, unpack_pages(expected, layout), strict=True)
        )

    for key_format, value_format in ((Int8(), Int4(32)), (NormalFloat4(32), double)):
        layout = PageLayout(64 * head_dim, head_dim, key_format, value_format)
        name = f"quantization {key_format.name} {value_format.name} D{head_dim}"
        yield bitwise(name, partial(is_same, layout))


def can_read_eight_bits(device: str) -> bool:
    """Whether kernels there can load float8_e4m3fn; cards from compute capability 8.9 on do."""
    return device == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def all_checks(device: str, *, small: bool, num_processes: int = 1) -> Iterator[Check]:
    """Every kernel.

    Args:
        device: where kernels run.
        small: tiny shapes.
        num_processes: that share the work, most of which is compiling.
    """
    kinds = [table_checks, compaction_checks, quantization_checks, score_checks, attention_checks]
    kinds += [tier_checks, sink_and_cap_checks]
    kinds += [eight_bit_checks] if can_read_eight_bits(device) else []
    parts = [(kind, head_dim) for head_dim in reversed(HEAD_DIMS) for kind in reversed(kinds)]
    if small:  # in the interpreter one size is enough of what takes long
        long = (table_checks, tier_checks, eight_bit_checks, sink_and_cap_checks)
        parts = [part for part in parts if part[1] == 64 or part[0] not in long]
    if num_processes == 1:
        for kind, head_dim in parts:
            yield from kind(device, head_dim, small=small)
        return
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        for checks in pool.map(run_part, *zip(*parts, strict=True), repeat(device), repeat(small)):
            yield from checks


def run_part(
    kind: Callable[..., Iterator[Check]], head_dim: int, device: str, small: bool
) -> list[Check]:
    """The checks of one kind at one head size, in a process of their own."""
    return list(kind(device, head_dim, small=small))
