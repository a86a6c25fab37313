"""Attention over prefixes with a quantized tier against its reference, in Triton's interpreter.

The tier's part is ``quantized_attention.py``; the launch is that of ``head_page_attention.py``.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpu.kernel_cases import Asked, Shape, attend, attend_exactly, make_case, relative_error
from vllm_kvzip.kernels.flat_tables import flatten_tables
from vllm_kvzip.kernels.reference import quantized_pages_of
from vllm_kvzip.quantization import Int4, Int8, NormalFloat4, rotate, rotate_back
from vllm_kvzip.quantization.rotation import hadamard_matrix

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter is slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")

NF4 = NormalFloat4(32, double_quantization=True)
FORMATS = st.sampled_from([NF4, NF4, NormalFloat4(16), Int4(32), Int8()])


def tier_sizes(case):
    """Quantized pages and tokens of every pair, ``[pairs, 2]``."""
    tables, tokens = case.tables, case.quantized.layout.page_tokens
    sizes = []
    for layer in range(tables.num_layers):
        for request in range(len(tables.slots)):
            for head in range(tables.num_kv_heads):
                ids, num_tokens = quantized_pages_of(tables, layer, request, head, tokens)
                sizes.append((len(ids), num_tokens))
    return torch.tensor(sizes)


def without_tier(case):
    return replace(case.tables, quantized_offsets=None, key_transforms=None)


def two_tiers(
    seed=0, dtype=torch.float32, formats=(NF4, NF4), rotated=True, group_size=3, split=None
):
    """A mixed batch: both tiers, one of them alone, and no prefix; other memory is NaN."""
    batch = [
        Asked(190, 1, 10, 0.3, 0.2), Asked(45, 2), Asked(150, 4, 8, 0.0, 0.5),
        Asked(170, 1, 9, 0.4), Asked(165, 3, 9, 0.1, 1.0),
    ]  # fmt: skip
    shape = Shape(num_layers=2, num_kv_heads=2, group_size=group_size)
    layout = shape.page_layout(dtype, *formats, split)
    return make_case(
        batch, shape, dtype=dtype, seed=seed, poison=True, layout=layout, rotated=rotated
    )


@st.composite
def requests(draw, block_tokens):
    query_len = draw(st.sampled_from([1, 1, 2, 5, 11]))
    blocks = draw(st.integers(0, 6))
    tail = draw(st.integers(query_len, query_len + 2 * block_tokens))
    ratio = draw(st.sampled_from([None, 0.0, 0.1, 0.5]))
    if ratio is None or not blocks:
        return Asked(blocks * block_tokens + tail, query_len)
    share = draw(st.sampled_from([0.0, 0.2, 1.0]))
    return Asked(blocks * block_tokens + tail, query_len, blocks, ratio, share)


@settings(max_examples=12, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_any_batch(data):
    """Decode and several query tokens, all kinds of prefixes and formats; other memory is NaN."""
    shape = Shape(
        num_layers=data.draw(st.integers(1, 3)),
        num_kv_heads=data.draw(st.integers(1, 2)),
        group_size=data.draw(st.sampled_from([1, 3, 4])),
        head_dim=data.draw(st.sampled_from([64, 96, 128])),
        page_tokens=data.draw(st.sampled_from([16, 32])),
        pages_per_head=data.draw(st.sampled_from([1, 1, 3])),
    )
    split = data.draw(st.sampled_from([None, None, 1, 2]))
    layout = shape.page_layout(torch.float32, data.draw(FORMATS), data.draw(FORMATS), split)
    case = make_case(
        data.draw(st.lists(requests(shape.block_tokens), min_size=1, max_size=3)),
        shape,
        seed=data.draw(st.integers(0, 99)),
        poison=True,
        layout=layout,
        rotated=data.draw(st.booleans()),
    )
    layer = data.draw(st.integers(0, shape.num_layers - 1))
    output = attend(
        case,
        layer,
        num_runs=data.draw(st.sampled_from([None, 1, 3])),
        least_run=data.draw(st.sampled_from([32, 128])),
        tokens=data.draw(st.sampled_from([32, 64])),
        quantized_tokens=data.draw(st.sampled_from([16, 32, 64])),
    )
    assert relative_error(output, attend_exactly(case, layer)) < 1e-5


@pytest.mark.parametrize(("rotated", "split"), [(False, 1), (True, 4)])
@pytest.mark.parametrize("formats", [(NF4, NF4), (Int4(32), Int8()), (Int8(), NormalFloat4(64))])
def test_tiers_are_one_softmax(formats, rotated, split):
    case = two_tiers(formats=formats, rotated=rotated, split=split)
    assert case.tables.split == split
    assert case.tables.key_transforms.isnan().any()  # of slots that nobody uses
    assert relative_error(attend(case, 1, num_runs=2, least_run=64), attend_exactly(case, 1)) < 1e-5


@pytest.mark.parametrize("head_dim", [96, 256])
def test_rotations_of_other_sizes(head_dim):
    """That of 96 is padded and not its own inverse; that of 256 is multiplied piece by piece."""
    shape = Shape(num_kv_heads=1, head_dim=head_dim)
    layout = shape.page_layout(torch.float32, NF4, Int8())
    case = make_case([Asked(90, 2, 5, 0.3, 0.3)], shape, poison=True, layout=layout, rotated=True)
    assert relative_error(attend(case, 0, num_runs=1), attend_exactly(case, 0)) < 1e-5


@pytest.mark.parametrize("num_runs", [1, 3, 7])
def test_runs_leave_no_token_out(num_runs):
    """Tiles of quantized tokens end elsewhere than runs do, and than the other tiles."""
    case = two_tiers(seed=1)
    output = attend(case, 0, num_runs=num_runs, least_run=32, tokens=32, quantized_tokens=64)
    assert relative_error(output, attend_exactly(case, 0)) < 1e-5


def test_the_mixed_batch_has_what_it_should():
    """Pairs without quantized pages, and with full ones, a part full one, and empty ones."""
    case = two_tiers()
    pages, tokens = tier_sizes(case).T
    each = case.quantized.layout.page_tokens
    assert (pages == 0).any()
    assert ((pages > 0) & (tokens == pages * each)).any()
    assert ((tokens % each > 0) & (tokens > (pages - 1) * each)).any()
    assert ((tokens <= (pages - 1) * each) & (pages > 0)).any()
    assert case.key_pages.isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = two_tiers(seed=3, dtype=dtype)
    assert relative_error(attend(case, 0, num_runs=4, least_run=64), attend_exactly(case, 0)) < 1e-2


def test_an_empty_tier_changes_nothing():
    """A batch without a quantized page, with the tier and without it."""
    shape = Shape(num_layers=2)
    batch = [Asked(190, 2, 10, 0.3), Asked(45)]
    case = make_case(batch, shape, poison=True, layout=shape.page_layout(torch.float32, NF4, NF4))
    plain = replace(case, quantized=None, tables=without_tier(case))
    how = {"num_runs": 2, "least_run": 64, "tokens": 64}
    assert torch.equal(attend(case, 1, **how), attend(plain, 1, **how))


@pytest.mark.parametrize("head_dim", [64, 96, 128])
def test_the_matrix_is_the_rotation_that_pages_are_filled_with(head_dim):
    matrix = hadamard_matrix(head_dim)
    x = torch.randn(5, head_dim, dtype=torch.float64)
    torch.testing.assert_close(x @ matrix.T, rotate(x))
    torch.testing.assert_close(x @ matrix, rotate_back(x))


def test_what_the_kernel_cannot_take_is_refused():
    case = two_tiers()
    tier = case.quantized
    for other in (
        replace(case, quantized=None),
        replace(case, tables=without_tier(case)),
        replace(case, tables=replace(case.tables, key_transforms=None)),
        replace(case, quantized=replace(tier, pages=tier.pages[:, :-16])),
        replace(case, quantized=replace(tier, rotation=tier.rotation.bfloat16())),
        replace(case, quantized=replace(tier, rotation=tier.rotation[:32, :32])),
        replace(case, query=case.query[..., :32]),
    ):
        with pytest.raises(ValueError, match=r"go together|pages|rotation"):
            attend(other, 0)
    with pytest.raises(ValueError, match="cannot be laid out"):
        flatten_tables(case.tables, torch.zeros(2, 10, 9), torch.zeros(2, 10))
