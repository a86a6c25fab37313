"""Attention over a cache of 8-bit numbers (``--kv-cache-dtype fp8``) against its reference."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from gpu.kernel_cases import Asked, Shape, attend, attend_exactly, make_case, relative_error
from vllm_kvzip.quantization import NormalFloat4

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter is slow
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted here")

NF4 = NormalFloat4(32, double_quantization=True)
BATCH = [
    Asked(190, 1, 10, 0.3, 0.2), Asked(45, 2), Asked(150, 4, 8, 0.0, 0.5), Asked(170, 1, 9, 0.4),
]  # fmt: skip


@settings(max_examples=10, deadline=None, phases=NO_SHRINKING)
@given(data=st.data())
def test_any_batch(data):
    """Scales differ between layers and heads; memory that nobody holds is NaN."""
    two_tiers = data.draw(st.booleans())
    shape = Shape(
        num_layers=data.draw(st.integers(1, 2)),
        num_kv_heads=data.draw(st.integers(1, 3)),
        group_size=data.draw(st.sampled_from([1, 3, 4])),
        head_dim=data.draw(st.sampled_from([64, 96, 128])),
    )
    case = make_case(
        data.draw(st.lists(st.sampled_from(BATCH), min_size=1, max_size=3)),
        shape,
        seed=data.draw(st.integers(0, 99)),
        poison=True,
        layout=shape.page_layout(torch.uint8, NF4, NF4) if two_tiers else None,
        rotated=two_tiers and data.draw(st.booleans()),
        eight_bits=data.draw(st.sampled_from(["pages", "queries too"])),
    )
    layer = data.draw(st.integers(0, shape.num_layers - 1))
    output = attend(case, layer, num_runs=data.draw(st.sampled_from([None, 1, 3])), least_run=32)
    assert output.dtype is torch.float32
    assert relative_error(output, attend_exactly(case, layer)) < 1e-5


def test_scales_matter():
    case = make_case(BATCH, Shape(num_layers=2), eight_bits="queries too")
    right = attend_exactly(case, 1)
    for which in range(3):
        wrong = case.stored_scales.clone()
        wrong[:, which] *= 1.5
        output = attend(case, 1, stored_scales=wrong[1])
        assert relative_error(output, right) > 0.01


def test_numbers_without_scales_are_refused():
    case = make_case(BATCH, Shape(num_layers=2), eight_bits="pages")
    with pytest.raises(ValueError, match="8-bit numbers need"):
        attend(case, 0, stored_scales=None)
    with pytest.raises(ValueError, match="8-bit numbers need"):
        attend(make_case(BATCH, Shape(num_layers=2), eight_bits="queries too"), 0, output=None)
