"""The kernels of quantized pages against their plain-torch references, in Triton's interpreter."""

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from vllm_kvzip.kernels import quantized_pages, quantized_tiles
from vllm_kvzip.kernels.formats.reference import read_reference
from vllm_kvzip.kernels.quantized_pages import dequantize_pages, quantize_pages
from vllm_kvzip.kernels.quantized_tiles import load_functions, page_constants
from vllm_kvzip.quantization import (
    Int4,
    Int8,
    NormalFloat4,
    PageLayout,
    pack_pages,
    packing,
    unpack_pages,
)

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter is slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FORMATS = st.one_of(
    st.just(Int8()),
    st.builds(Int4, st.sampled_from([16, 32])),
    st.builds(NormalFloat4, st.sampled_from([16, 32]), double_quantization=st.booleans()),
)
POISON = 0xFF  # a NaN in every float


def awkward(generator, tokens, head_dim, dtype):
    """Zeros, constants, outliers and the ends of the number range among normal vectors."""
    limit = torch.finfo(dtype).max
    x = torch.randn(tokens, head_dim, generator=generator)
    kind = torch.randint(8, (tokens, 1), generator=generator)
    x = torch.where(kind == 0, 0, x)
    x = torch.where(kind == 1, x[:, :1], x)
    x = torch.where(kind == 2, x + 1000, x)
    x[:, 3] *= torch.where(kind[:, 0] == 3, 1e4, 1)
    x = torch.where(kind == 4, x * 1e-30, x).clamp(-limit, limit).to(dtype)
    x[(kind == 5)[:, 0], 7] = limit
    x[(kind == 5)[:, 0], 8] = -limit
    return x


@st.composite
def layouts(draw):
    head_dim = draw(st.sampled_from([64, 96, 128, 256]))
    block_size = draw(st.sampled_from([16, 32, 64, 128] if head_dim < 128 else [16, 32]))
    return PageLayout(4 * block_size * head_dim, head_dim, draw(FORMATS), draw(FORMATS))


def code_book(layout):
    books = [half.format.code_book for half in (layout.keys, layout.values)]
    return next((book for book in books if book is not None), None)


@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
@given(
    layout=layouts(),
    dtype=DTYPES,
    num_pages=st.integers(1, 3),
    missing=st.integers(0, 20),
    int_dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 9999),
)
def test_pages_are_filled_bit_for_bit(layout, dtype, num_pages, missing, int_dtype, seed):
    """Rows lie anywhere among NaN, the last ones are missing; nothing else is written."""
    random = torch.Generator().manual_seed(seed)
    tokens = num_pages * layout.page_tokens - min(missing, layout.page_tokens - 1)
    exact = [awkward(random, tokens, layout.head_dim, dtype) for _ in range(2)]
    where = torch.randperm(2 * tokens, generator=random)[:tokens]
    memory = torch.full((2 * tokens, 3 * layout.head_dim), float("nan"), dtype=dtype)
    keys, values = memory[:, : layout.head_dim], memory[:, -layout.head_dim :]
    keys[where], values[where] = exact
    rows = torch.full((num_pages, layout.page_tokens), -1, dtype=int_dtype)
    rows.view(-1)[:tokens] = where
    ids = torch.randperm(2 * num_pages, generator=random)[:num_pages]
    pages = torch.full((2 * num_pages, layout.page_bytes), POISON, dtype=torch.uint8)
    expected = pages.clone()
    expected[ids] = pack_pages(*exact, layout, pages[ids])
    quantize_pages(keys, values, rows, pages, ids.to(int_dtype), layout, code_book(layout))
    assert torch.equal(pages, expected)


@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
@given(layout=layouts(), dtype=DTYPES, num_pages=st.integers(1, 3), seed=st.integers(0, 9999))
def test_pages_are_read_bit_for_bit(layout, dtype, num_pages, seed):
    """Tiles of tokens go over the ends of pages; other pages and gaps are poison."""
    random = torch.Generator().manual_seed(seed)
    size = (num_pages * layout.page_tokens, layout.head_dim)
    exact = [awkward(random, *size, dtype) for _ in range(2)]
    ids = torch.randperm(2 * num_pages, generator=random)[:num_pages]
    pages = torch.full((2 * num_pages, layout.page_bytes), POISON, dtype=torch.uint8)
    pages[ids] = pack_pages(*exact, layout, pages[ids])
    found = torch.full((2, size[0] + 1, size[1] + 5), float("nan"))
    dequantize_pages(pages, ids, *found[:, :-1, : layout.head_dim], layout, code_book(layout))
    expected = torch.stack(unpack_pages(pages[ids], layout))
    assert expected.isfinite().all()
    assert torch.equal(found[:, :-1, : layout.head_dim], expected)
    assert found[:, -1].isnan().all()
    assert found[:, :, layout.head_dim :].isnan().all()


def kind(form):
    if isinstance(form, NormalFloat4):
        return "double nf4" if form.double_quantization else "nf4"
    return form.name


@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
@given(layout=layouts(), seed=st.integers(0, 9999))
def test_pages_are_read_as_their_bytes_say(layout, seed):
    """The literal version beside the kernels knows nothing of the formats' classes."""
    random = torch.Generator().manual_seed(seed)
    size = (2 * layout.page_tokens, layout.head_dim)
    exact = [awkward(random, *size, torch.float32) for _ in range(2)]
    empty = torch.full((2, layout.page_bytes), POISON, dtype=torch.uint8)
    pages = pack_pages(*exact, layout, empty)
    found = torch.full((2, *size), float("nan"))
    dequantize_pages(pages, torch.arange(2), *found, layout, code_book(layout))
    numbers = page_constants(layout)
    for which, half, rows in zip(
        ("KEY", "VALUE"), (layout.keys, layout.values), found, strict=True
    ):
        offsets = {
            name.lower(): numbers[f"{which}_{name}"]
            for name in ("CODES", "GROUP", "SCALES", "BLOCK")
        }
        book = half.format.code_book
        wanted = read_reference(
            kind(half.format), pages, layout.page_tokens, layout.head_dim, code_book=book, **offsets
        )
        assert torch.equal(rows.view_as(wanted), wanted)


@triton.jit
def store_tile(
    pages, page, page_stride, in_page, wanted, code_book, tile,
    LOAD: tl.constexpr, CODES: tl.constexpr, GROUP: tl.constexpr,
    SCALES: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """A tile as an attention kernel gets it, padding included."""
    rows = tl.arange(0, TOKENS)
    found = LOAD(
        pages, tl.load(page + rows), page_stride, tl.load(in_page + rows),
        tl.load(wanted + rows) != 0, code_book,
        CODES, GROUP, SCALES, BLOCK, D, D_PADDED,
    )  # fmt: skip
    tl.store(tile + rows[:, None] * D_PADDED + tl.arange(0, D_PADDED)[None, :], found)


@settings(max_examples=25, deadline=None, phases=NO_SHRINKING)
@given(layout=layouts(), seed=st.integers(0, 9999), half=st.sampled_from(["KEY", "VALUE"]))
def test_a_tile_is_zero_where_nothing_is_wanted(layout, seed, half):
    """Every token has a page of its own; a page of poison stands for those that are not wanted."""
    random = torch.Generator().manual_seed(seed)
    num_pages, tokens = 3, 16
    size = (num_pages * layout.page_tokens, layout.head_dim)
    exact = [awkward(random, *size, torch.float32) for _ in range(2)]
    pages = torch.full((num_pages + 1, layout.page_bytes), POISON, dtype=torch.uint8)
    pack_pages(*exact, layout, pages[:num_pages])
    wanted = torch.rand(tokens, generator=random) < 0.7
    page = torch.randint(num_pages, (tokens,), generator=random)
    in_page = torch.randint(layout.page_tokens, (tokens,), generator=random, dtype=torch.int32)
    in_page[:2] = layout.page_tokens - 1  # behind it lies something else
    padded = triton.next_power_of_2(layout.head_dim)
    tile = torch.full((tokens, padded), float("nan"))
    constants = page_constants(layout) | load_functions(layout)
    names = ("LOAD", "CODES", "GROUP", "SCALES", "BLOCK")
    store_tile[(1,)](
        pages, torch.where(wanted, page, num_pages), pages.stride(0), in_page, wanted.int(),
        NormalFloat4.code_book, tile, **{name: constants[f"{half}_{name}"] for name in names},
        D=layout.head_dim, D_PADDED=padded, TOKENS=tokens,
    )  # fmt: skip
    expected = torch.zeros(tokens, padded)
    stored = unpack_pages(pages[:num_pages], layout)[half == "VALUE"]
    rows = page * layout.page_tokens + in_page
    expected[wanted, : layout.head_dim] = stored[rows[wanted]]
    assert torch.equal(tile, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows(dtype):
    layout = PageLayout(8192, 128, NormalFloat4(), Int8())
    keys, values = torch.randn(2, layout.page_tokens, 128)
    pages = pack_pages(keys, values, layout)
    found = torch.full((2, layout.page_tokens, 128), float("nan"), dtype=dtype)
    dequantize_pages(pages, torch.tensor([0]), *found, layout, NormalFloat4.code_book)
    for rounded, exact in zip(found, unpack_pages(pages, layout), strict=True):
        limit = exact.abs() * torch.finfo(dtype).eps + 1e-7
        assert ((rounded.float() - exact).abs() <= limit).all()


def test_what_a_kernel_cannot_take_is_refused():
    layout = PageLayout(8192, 128, Int8(), Int8())
    vectors = torch.zeros(layout.page_tokens, 128)
    rows = torch.zeros(1, layout.page_tokens, dtype=torch.int32)
    ids = torch.zeros(1, dtype=torch.int32)
    pages = torch.zeros(1, 8192, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows of 8192 bytes"):
        quantize_pages(vectors, vectors, rows, pages[:, :4096], ids, layout, None)
    with pytest.raises(ValueError, match="contiguous rows of 128"):
        dequantize_pages(pages, ids, vectors, vectors.T.contiguous().T, layout, None)
    with pytest.raises(ValueError, match=r"rows must be contiguous \[1, 30\]"):
        quantize_pages(vectors, vectors, rows[:, :-1], pages, ids, layout, None)


def test_kernels_and_references_share_their_numbers():
    assert quantized_pages.LARGEST.value == packing.LARGEST
    assert quantized_pages.SMALLEST_SCALE.value == packing.SMALLEST_SCALE
    assert quantized_pages.LARGEST_FLOAT8.value == packing.LARGEST_FLOAT8
    assert quantized_tiles.FLOAT8_EXPONENT.value == packing._FLOAT8_EXPONENT
