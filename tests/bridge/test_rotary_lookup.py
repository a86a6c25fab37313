"""Which rotary angles a model uses: found beside its attention layers, or known to be missing."""

from types import SimpleNamespace

import pytest
from torch import nn

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.rotary import find_rotary

pytestmark = pytest.mark.vllm


def test_rotation_that_only_the_configuration_knows_of_is_not_passed_over():
    """As in vLLM's Transformers backend: keys are rotated, and nothing says by which angles."""
    config = SimpleNamespace(rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"})
    with pytest.raises(UnsupportedError, match=r"rotary embedding of layer layers\.0"):
        find_rotary(nn.Module(), ["layers.0"], config)


def test_a_model_without_rotation_has_none():
    assert find_rotary(nn.Module(), ["layers.0"], SimpleNamespace()) == [None]
