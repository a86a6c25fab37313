"""Formats, layout and bytes of quantized pages."""

import itertools
import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvzip.quantization import (
    Int4,
    Int8,
    NormalFloat4,
    PageLayout,
    pack_pages,
    unpack_pages,
)
from vllm_kvzip.quantization.formats.nf4 import BOUNDARIES, LEVELS, normal_float_levels
from vllm_kvzip.quantization.packing import (
    LARGEST,
    SMALLEST_SCALE,
    bfloat16_down,
    bfloat16_up,
    float8_decode,
    float8_encode,
    pack_nibbles,
    unpack_nibbles,
)

HEAD_DIMS = st.sampled_from([64, 96, 128, 256])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FORMATS = st.one_of(
    st.just(Int8()),
    st.builds(Int4, st.sampled_from([16, 32])),
    st.builds(NormalFloat4, st.sampled_from([16, 32]), double_quantization=st.booleans()),
)
MAXIMUM = torch.finfo(torch.float32).max


@st.composite
def vectors(draw, tokens, head_dim):
    """Vectors of one page with zeros, constants, offsets and outliers among them."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9999)))
    x = torch.randn(tokens, head_dim, generator=generator, dtype=torch.float64)
    for row in range(tokens):
        kind = torch.randint(6, (1,), generator=generator).item()
        if kind == 0:
            x[row] = 0
        elif kind == 1:
            x[row] = x[row, 0]
        elif kind == 2:
            x[row] += 1000
        elif kind == 3:
            x[row, row % head_dim] *= 1e4
    dtype = draw(DTYPES)
    exponent = draw(st.integers(-4, 0) if dtype is torch.float16 else st.integers(-25, 30))
    return (x * 10.0**exponent).to(dtype)


def blocks_of(form, x):
    return x.view(*x.shape[:-1], -1, form.block_values(x.shape[-1]))


def error_bound(form, exact):
    """Largest error that each value of a page may have, from the definition of the format.

    Half a step between codes; a bfloat16 scale may be larger by one in 256 when it is rounded to
    the nearest, and by one in 128 when it is rounded up. A little more for float32 arithmetic.
    """
    blocks = blocks_of(form, exact.double())
    magnitude = blocks.abs().amax(dim=-1, keepdim=True)
    if isinstance(form, Int8):
        bound = torch.maximum(magnitude / 127, torch.tensor(SMALLEST_SCALE)) * (1 + 1 / 256) / 2
    elif isinstance(form, Int4):
        least, most = blocks.amin(dim=-1, keepdim=True), blocks.amax(dim=-1, keepdim=True)
        spread = most - (least - least.abs() / 128)
        bound = (spread / 15).clamp(min=SMALLEST_SCALE) * (1 + 1 / 128) / 2
    else:
        step = (LEVELS[1:] - LEVELS[:-1]).max().double() / 2
        rounding, floor = 1 / 256, SMALLEST_SCALE
        if form.double_quantization:  # scales lie within 2**14 of the page's largest
            rounding, floor = 1 / 32, max(SMALLEST_SCALE, magnitude.max() / 1.9375 * 2**-14)
        bound = magnitude.clamp(min=floor) * (1 + rounding) * step
    return (bound + 2e-6 * magnitude).expand_as(blocks).reshape(exact.shape)


@settings(deadline=None, max_examples=150)
@given(data=st.data(), form=FORMATS, head_dim=HEAD_DIMS, tokens=st.integers(1, 40))
def test_no_value_is_off_by_more_than_the_format_allows(data, form, head_dim, tokens):
    exact = data.draw(vectors(tokens, head_dim))
    found = form.decode(form.encode(exact))
    assert found.dtype is torch.float32
    assert found.isfinite().all()
    assert ((found.double() - exact.double()).abs() <= error_bound(form, exact)).all()


@settings(deadline=None)
@given(form=FORMATS, dtype=DTYPES)
def test_zeros_stay_zeros(form, dtype):
    assert (form.decode(form.encode(torch.zeros(3, 64, dtype=dtype))) == 0).all()


@settings(deadline=None)
@given(
    form=FORMATS,
    dtype=DTYPES,
    value=st.sampled_from([1.0, -3.0, MAXIMUM, -MAXIMUM, 1e-38, 1e-45]),
    seed=st.integers(0, 99),
)
def test_the_ends_of_the_number_range_stay_finite(form, dtype, value, seed):
    random = torch.Generator().manual_seed(seed)
    limit = torch.finfo(dtype).max
    x = (torch.randn(4, 64, generator=random).double() * value).clamp(-limit, limit).to(dtype)
    x[0, 5], x[1, 6] = limit, -limit
    x[2] = limit
    found = form.decode(form.encode(x))
    assert found.isfinite().all()
    clamped = x.float().clamp(-LARGEST, LARGEST)
    assert ((found.double() - clamped.double()).abs() <= error_bound(form, clamped)).all()


@settings(deadline=None)
@given(form=FORMATS, head_dim=HEAD_DIMS, tokens=st.integers(1, 30))
def test_bits_are_what_is_stored(form, head_dim, tokens):
    encoded = form.encode(torch.randn(2, tokens, head_dim))
    parts = [encoded.codes, encoded.scales, encoded.group_scale]
    stored = sum(part.numel() * part.element_size() for part in parts if part is not None)
    assert math.isclose(form.bits_per_value(head_dim, tokens), 8 * stored / (2 * tokens * head_dim))


def test_levels_are_those_of_the_paper():
    """Appendix E of arXiv 2305.14314."""
    published = [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]  # fmt: skip
    exact = torch.tensor(published)
    torch.testing.assert_close(normal_float_levels(), exact, atol=1e-6, rtol=0)
    torch.testing.assert_close(LEVELS, exact, atol=1e-6, rtol=2**-11)
    assert LEVELS[7] == 0
    assert LEVELS[0] == -1
    assert LEVELS[15] == 1
    assert (LEVELS[:-1] < BOUNDARIES).all()
    assert (LEVELS[1:] > BOUNDARIES).all()


@settings(deadline=None)
@given(seed=st.integers(0, 999), double=st.booleans())
def test_every_value_takes_the_nearest_level(seed, double):
    form = NormalFloat4(32, double_quantization=double)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    encoded = form.encode(x)
    if double:
        scale = float8_decode(encoded.scales) * encoded.group_scale
    else:
        scale = encoded.scales.view(torch.bfloat16).float()
    distance = (x.view(5, 2, 32, 1) / scale[:, :, None, None] - LEVELS).abs()
    codes = unpack_nibbles(encoded.codes, 32).long()[..., None]
    assert (distance.gather(-1, codes)[..., 0] <= distance.amin(dim=-1) + 1e-6).all()


@settings(deadline=None)
@given(form=FORMATS, seed=st.integers(0, 9999), rounds=st.integers(1, 10))
def test_what_was_decoded_stays_the_same_in_other_pages(form, seed, rounds):
    """Vectors of very different lengths, which meet others in each round."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 64, generator=random) * torch.logspace(-1, 1, 60)[:, None]
    x[:, 5] *= torch.rand(60, generator=random) * 10

    def through(vectors):
        return form.decode(form.encode(vectors.view(3, 20, 64))).view(60, 64)

    first = through(x)
    found = first
    for _ in range(rounds):
        order = torch.randperm(60, generator=random)
        found = through(found[order])[order.argsort()]
    assert torch.equal(found, first)


def test_where_a_4_bit_code_lies():
    codes = torch.arange(32, dtype=torch.uint8).view(1, 2, 16) % 16
    packed = pack_nibbles(codes)
    assert packed.tolist() == [[low | (low + 8) << 4 for low in range(8)] * 2]
    assert torch.equal(unpack_nibbles(packed, 16), codes)


def test_8_bit_floats():
    codes = torch.arange(256, dtype=torch.uint8)
    values = float8_decode(codes)
    assert values.tolist() == [(1 + c % 16 / 16) * 2.0 ** (c // 16 - 15) for c in range(256)]
    assert torch.equal(float8_encode(values), codes)
    between = torch.logspace(-15, 0, 5000, base=2.0)
    nearest = (between[:, None] - values).abs().amin(dim=1)
    found = (float8_decode(float8_encode(between)) - between).abs()
    torch.testing.assert_close(found, nearest, rtol=0, atol=0)
    assert (found <= between / 32).all()
    assert float8_encode(torch.tensor([0.0, 1e-30, 99.0])).tolist() == [0, 0, 255]


@settings(deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_directed_rounding_to_bfloat16(numbers):
    exact = torch.tensor(numbers).clamp(-LARGEST, LARGEST)
    below, above = bfloat16_down(exact).float(), bfloat16_up(exact.abs()).float()
    assert (below <= exact).all()
    assert (above >= exact.abs()).all()
    nearest = exact.bfloat16().float()
    step = exact.abs().double() / 128 + 2.0**-133
    assert ((exact.double() - below.double()) <= step).all()
    assert ((above.double() - exact.abs().double()) <= step).all()
    assert torch.equal(below[nearest == exact], exact[nearest == exact])


def regions(layout):
    """(first byte, bytes, alignment) of every part of a page."""
    for half in (layout.keys, layout.values):
        codes, scales = (
            layout.page_tokens * count(layout.head_dim)
            for count in (half.format.code_bytes, half.format.scale_bytes)
        )
        yield half.codes_offset, codes, 16
        yield half.scales_offset, scales, 1 if half.format.group_bytes else 4
        if half.format.group_bytes:
            yield half.group_offset, 4, 4


@settings(deadline=None)
@given(
    keys=FORMATS,
    values=FORMATS,
    head_dim=HEAD_DIMS,
    sixteens=st.integers(40, 4000),
)
def test_regions_fit_their_page_and_leave_little(keys, values, head_dim, sixteens):
    layout = PageLayout(16 * sixteens, head_dim, keys, values)
    parts = sorted(regions(layout))
    assert all(start % alignment == 0 for start, _, alignment in parts)
    for (start, size, _), (following, _, _) in itertools.pairwise(parts):
        assert start + size <= following
    start, size, _ = parts[-1]
    assert layout.used_bytes == start + size <= layout.page_bytes
    each = keys.vector_bytes(head_dim) + values.vector_bytes(head_dim)
    waste = layout.page_bytes - layout.page_tokens * each
    assert waste <= layout.page_bytes / 16 + each + 64  # what rounding may cost, gaps, groups
    assert layout.bits_per_value >= max(
        (keys.bits_per_value(head_dim, layout.page_tokens)
         + values.bits_per_value(head_dim, layout.page_tokens)) / 2, 4
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "tokens"),
    [
        (Int8(), 30),  # 31 fit
        (Int4(64), 56),
        (NormalFloat4(64), 60),
        (NormalFloat4(64, double_quantization=True), 60),  # 62 fit
        (NormalFloat4(32, double_quantization=True), 60),
    ],
)
def test_tokens_of_a_page_of_8192_bytes(form, tokens):
    assert PageLayout(8192, 128, form, form).page_tokens == tokens


def test_a_quarter_of_the_bits_holds_three_and_a_half_times_the_tokens():
    for form in (NormalFloat4(64), NormalFloat4(32, double_quantization=True)):
        layout = PageLayout(8192, 128, form, form)
        assert layout.page_tokens >= 3.5 * 16
        assert form.bits_per_value(128, layout.page_tokens) <= layout.bits_per_value <= 4.5


@pytest.mark.parametrize(
    ("page_bytes", "head_dim", "form", "message"),
    [
        (8192, 96, NormalFloat4(64), "head size of 96 is not made of whole blocks of 64"),
        (256, 128, Int8(), "page of 256 bytes is too small .* takes 262"),
        (0, 128, Int4(), "page of 0 bytes is too small"),
        (1000, 128, Int8(), "1000 bytes is no multiple of 16"),
    ],
)
def test_what_does_not_fit_is_refused(page_bytes, head_dim, form, message):
    with pytest.raises(ValueError, match=message):
        PageLayout(page_bytes, head_dim, form, form)


@pytest.mark.parametrize("size", [0, 8, 48, -16])
def test_block_sizes_that_cannot_be_packed_are_refused(size):
    for kind in (Int4, NormalFloat4):
        with pytest.raises(ValueError, match=f"not {size}"):
            kind(size)


@settings(deadline=None, max_examples=40)
@given(
    data=st.data(),
    keys=FORMATS,
    values=FORMATS,
    head_dim=HEAD_DIMS,
    block_size=st.sampled_from([16, 32, 128]),
    tokens=st.integers(1, 200),
)
def test_pages_hold_what_the_formats_encode(data, keys, values, head_dim, block_size, tokens):
    layout = PageLayout(4 * block_size * head_dim, head_dim, keys, values)
    exact = [data.draw(vectors(tokens, head_dim)) for _ in range(2)]
    num_pages = -(-tokens // layout.page_tokens)
    pages = torch.full((num_pages, layout.page_bytes), 0xA5, dtype=torch.uint8)
    pack_pages(*exact, layout, pages)
    mine = torch.zeros(layout.page_bytes, dtype=torch.bool)
    for start, size, _ in regions(layout):
        mine[start : start + size] = True
    assert (pages[:, ~mine] == 0xA5).all()
    for form, vectors_in, found in zip(
        (keys, values), exact, unpack_pages(pages, layout), strict=True
    ):
        padded = torch.zeros(num_pages * layout.page_tokens, head_dim, dtype=vectors_in.dtype)
        padded[:tokens] = vectors_in
        by_page = padded.view(num_pages, layout.page_tokens, head_dim)
        assert torch.equal(found, form.decode(form.encode(by_page)).flatten(0, 1))


def test_the_bytes_of_a_page():
    """One int8 token and its neighbour, byte by byte."""
    layout = PageLayout(160, 32, Int8(), Int8())
    assert layout.page_tokens == 2
    keys = torch.zeros(2, 32)
    keys[0, :3] = torch.tensor([127.0, -127.0, 64.0])
    keys[1, 31] = -254.0
    page = pack_pages(keys, torch.zeros(2, 32), layout)[0].tolist()
    assert page[:4] == [127, 256 - 127, 64, 0]
    assert page[63] == 256 - 127
    assert bytes(page[128:132]) == struct.pack("<ff", 1.0, 2.0)[2:4] + struct.pack("<f", 2.0)[2:]
