"""The attention kernel against its plain-torch reference, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpu.kernel_cases import Asked, Shape, attend, attend_exactly, make_case, relative_error
from vllm_kvzip.kernels.tile_sizes import choose_num_runs

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter is slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")


@st.composite
def requests(draw, block_tokens):
    query_len = draw(st.sampled_from([1, 1, 2, 5, 19]))
    blocks = draw(st.integers(0, 5))
    tail = draw(st.integers(query_len, query_len + 3 * block_tokens))
    ratio = draw(st.sampled_from([None, 0.1, 0.5, 1.0]))
    if ratio is None or not blocks:
        return Asked(blocks * block_tokens + tail, query_len)
    return Asked(blocks * block_tokens + tail, query_len, blocks, ratio)


@settings(max_examples=15, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_any_batch(data):
    """Decode, several query tokens, compressed and other requests mixed; other memory is NaN."""
    shape = Shape(
        num_layers=data.draw(st.integers(1, 3)),
        num_kv_heads=data.draw(st.integers(1, 3)),
        group_size=data.draw(st.sampled_from([1, 3, 4, 8])),
        head_dim=data.draw(st.sampled_from([64, 96, 128, 256])),
        page_tokens=data.draw(st.sampled_from([16, 32, 128])),
        pages_per_head=data.draw(st.sampled_from([1, 1, 2, 3])),
    )
    batch = data.draw(st.lists(requests(shape.block_tokens), min_size=1, max_size=4))
    case = make_case(batch, shape, seed=data.draw(st.integers(0, 99)), poison=True)
    layer = data.draw(st.integers(0, shape.num_layers - 1))
    output = attend(
        case,
        layer,
        num_runs=data.draw(st.sampled_from([None, 1, 3])),
        least_run=data.draw(st.sampled_from([32, 128])),
        tokens=data.draw(st.sampled_from([32, 64])),
    )
    assert relative_error(output, attend_exactly(case, layer)) < 1e-5


@pytest.mark.parametrize("num_runs", [1, 2, 3, 7])
def test_runs_leave_no_token_out(num_runs):
    case = make_case(
        [Asked(300), Asked(200, 1, 8, 0.5), Asked(33, 2)], Shape(), seed=1, poison=True
    )
    output = attend(case, 0, num_runs=num_runs, least_run=32, tokens=64)
    assert relative_error(output, attend_exactly(case, 0)) < 1e-5


@pytest.mark.parametrize("rows", [16, 32])
def test_a_long_query_beside_short_ones(rows):
    """Tiles are dealt to requests by their lengths; group 3 fits no tile evenly."""
    lengths = (1, 40, 1, 7, 16, 1, 33)
    batch = [Asked(90 + n, n, 4, 0.5) if n % 2 else Asked(60 + n, n) for n in lengths]
    case = make_case(batch, Shape(group_size=3), seed=5, poison=True)
    assert relative_error(attend(case, 0, rows=rows, least_run=32), attend_exactly(case, 0)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = make_case(
        [Asked(200, 1, 8, 0.4), Asked(70, 3), Asked(333, 2, 20, 0.2)], Shape(), dtype=dtype, seed=3
    )
    assert relative_error(attend(case, 0, num_runs=4, least_run=64), attend_exactly(case, 0)) < 1e-2


def test_nothing_but_the_wanted_rows_is_written():
    """Rows behind the batch, as CUDA graphs pad it, stay as they are."""
    case = make_case([Asked(50, 1), Asked(90, 1, 4, 0.5)], Shape(), seed=1)
    padded = torch.full((5, *case.query.shape[1:]), float("nan"))
    padded[:2] = case.query
    output = torch.full_like(padded, 7.0)
    attend(replace(case, query=padded), 0, output=output, num_runs=3, least_run=32)
    assert relative_error(output[:2], attend_exactly(case, 0)) < 1e-5
    assert (output[2:] == 7.0).all()


def test_a_slice_of_the_queries_may_be_strided():
    """vLLM hands over a view of the fused query-key-value projection."""
    case = make_case([Asked(77, 2, 2, 0.5)], Shape(), seed=2)
    wide = torch.randn(2, 3 * case.query.shape[1], case.query.shape[2])
    wide[:, : case.query.shape[1]] = case.query
    strided = replace(case, query=wide[:, : case.query.shape[1]])
    output = attend(strided, 0, output=None)
    assert relative_error(output, attend_exactly(case, 0)) < 1e-5


def test_pages_may_have_any_strides():
    """vLLM's CPU cache holds the keys of a page dimension by dimension."""
    case = make_case([Asked(77, 2, 2, 0.5), Asked(40, 1)], Shape(), seed=4)
    by_dimension = case.key_pages.transpose(1, 2).contiguous().transpose(1, 2)
    other = replace(case, key_pages=by_dimension, value_pages=case.value_pages.contiguous())
    assert other.key_pages.stride() != other.value_pages.stride()
    output = attend(other, 0, num_runs=2, least_run=32)
    assert relative_error(output, attend_exactly(case, 0)) < 1e-5


@given(
    programs=st.integers(1, 1 << 20),
    most=st.integers(1, 1 << 20),
    processors=st.integers(1, 200),
)
def test_runs_are_neither_tiny_nor_too_many(programs, most, processors):
    runs = choose_num_runs(programs, most, processors, 256)
    assert 1 <= runs <= 32
    assert runs == 1 or (runs - 1) * 256 < most
    assert runs * programs >= min(16 * processors, 32 * programs, -(-most // 256) * programs)
    assert runs <= 4 or (runs - 1) * programs < 16 * processors
