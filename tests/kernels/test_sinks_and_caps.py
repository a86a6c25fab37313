"""Attention with learned logits and capped ones against its reference, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpu.kernel_cases import Asked, Shape, attend, attend_exactly, make_case, relative_error
from vllm_kvzip.quantization import Int8, NormalFloat4

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter is slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")

NF4 = NormalFloat4(32, double_quantization=True)
BATCH = [
    Asked(190, 1, 10, 0.3, 0.2), Asked(45, 2), Asked(150, 4, 8, 0.0, 0.5), Asked(170, 1, 9, 0.4),
]  # fmt: skip
TERMS = st.sampled_from([(True, None), (False, 1.5), (True, 1.5), (True, 50.0)])


@settings(max_examples=20, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_any_batch(data):
    """Pages of every kind, in one run and in several, in which the learned logit counts once."""
    two_tiers = data.draw(st.booleans())
    eight_bits = data.draw(st.sampled_from(["none", "none", "pages", "queries too"]))
    shape = Shape(
        num_layers=data.draw(st.integers(1, 2)),
        num_kv_heads=data.draw(st.integers(1, 3)),
        group_size=data.draw(st.sampled_from([1, 3, 8])),
        head_dim=data.draw(st.sampled_from([64, 96, 128])),
    )
    stored = torch.float32 if eight_bits == "none" else torch.uint8
    formats = (NF4, data.draw(st.sampled_from([NF4, NormalFloat4(16)])))
    sinks, soft_cap = data.draw(TERMS)
    case = make_case(
        data.draw(st.lists(st.sampled_from(BATCH), min_size=1, max_size=3)),
        shape,
        seed=data.draw(st.integers(0, 99)),
        poison=True,
        layout=shape.page_layout(stored, *formats) if two_tiers else None,
        rotated=two_tiers and data.draw(st.booleans()),
        eight_bits=eight_bits,
        sinks=sinks,
        soft_cap=soft_cap,
    )
    layer = data.draw(st.integers(0, shape.num_layers - 1))
    output = attend(
        case,
        layer,
        num_runs=data.draw(st.sampled_from([None, 1, 3])),
        least_run=data.draw(st.sampled_from([32, 128])),
    )
    assert relative_error(output, attend_exactly(case, layer)) < 1e-5


@pytest.mark.parametrize("num_runs", [1, 2, 7])
@pytest.mark.parametrize(("sinks", "soft_cap"), [(True, None), (False, 2.0), (True, 2.0)])
def test_runs_count_a_learned_logit_once(num_runs, sinks, soft_cap):
    """Also beside a request so short that it has one run."""
    shape = Shape(num_layers=2, group_size=3)
    layout = shape.page_layout(torch.float32, NF4, Int8())
    case = make_case(
        [*BATCH, Asked(3, 3)], shape, seed=1, poison=True, layout=layout, rotated=True,
        sinks=sinks, soft_cap=soft_cap,
    )  # fmt: skip
    output = attend(case, 1, num_runs=num_runs, least_run=32, tokens=32)
    assert relative_error(output, attend_exactly(case, 1)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    case = make_case(BATCH, Shape(), dtype=dtype, seed=3, sinks=True, soft_cap=2.0)
    assert case.sink_logits.dtype is dtype
    assert relative_error(attend(case, 0, num_runs=4, least_run=64), attend_exactly(case, 0)) < 1e-2


@pytest.mark.parametrize("number", [-float("inf"), -300.0, 300.0])
def test_extreme_logits(number):
    """A learned logit that counts nothing, or everything; products far beyond the cap."""
    case = make_case(BATCH, Shape(), seed=2, sinks=True, soft_cap=2.0)
    case = replace(case, sink_logits=torch.full_like(case.sink_logits, number))
    case = replace(case, query=1e4 * case.query)
    output, right = attend(case, 0, num_runs=2, least_run=64), attend_exactly(case, 0)
    assert output.isfinite().all()
    if number == 300.0:
        assert output.abs().max() == right.abs().max().float() == 0.0
    else:
        assert relative_error(output, right) < 1e-5


def test_both_matter():
    case = make_case(BATCH, Shape(), sinks=True, soft_cap=1.5)
    right = attend_exactly(case, 0)
    for wrong in (
        {"sink_logits": None},
        {"sink_logits": case.sink_logits.flip(0)},
        {"soft_cap": None},
        {"soft_cap": 3.0},
    ):
        assert relative_error(attend(case, 0, **wrong), right) > 0.01


def test_a_cap_of_zero_is_none():
    """So vLLM says it."""
    case = make_case(BATCH, Shape(), seed=5)
    assert torch.equal(attend(case, 0, soft_cap=0.0), attend(case, 0))


def test_logits_of_other_heads_are_refused():
    case = make_case(BATCH, Shape(), sinks=True)
    with pytest.raises(ValueError, match="7 learned logits for 8 query heads"):
        attend(case, 0, sink_logits=case.sink_logits[:7])
