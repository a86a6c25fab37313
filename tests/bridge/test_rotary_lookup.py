"""Rotary angles and positions of a model: found beside its layers, or known to be missing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.rotary import find_rotary, num_positions

pytestmark = pytest.mark.vllm

LONG_ROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


def test_rotation_that_only_the_configuration_knows_of_is_not_passed_over():
    """As in vLLM's Transformers backend: keys are rotated, and nothing says by which angles."""
    config = SimpleNamespace(rope_parameters={"rope_theta": 10_000.0, "rope_type": "default"})
    with pytest.raises(UnsupportedError, match=r"rotary embedding of layer layers\.0"):
        find_rotary(nn.Module(), ["layers.0"], config)


def test_a_model_without_rotation_has_none():
    assert find_rotary(nn.Module(), ["layers.0"], SimpleNamespace()) == [None]


@pytest.mark.parametrize(
    ("rope", "max_model_len", "positions"),
    [
        ({"rope_type": "default"}, 100, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 100, 512),
        (LONG_ROPE, 100, 128),
        (LONG_ROPE, 300, 512),
    ],
)
def test_positions_are_those_that_the_rotary_embedding_has(rope, max_model_len, positions):
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=max_model_len)
    theta = 10_000.0 + max_model_len  # vLLM returns the same embedding for the same arguments
    with set_current_vllm_config(config):
        rotary = get_rope(
            16,
            max_position=512,
            rope_parameters={"rope_theta": theta, **rope},
            dtype=torch.float32,
        )
    model = nn.ModuleList([nn.Linear(2, 2), rotary])
    assert num_positions(model, SimpleNamespace(max_position_embeddings=7), 100) == positions


def test_positions_of_a_model_without_rotary_embedding():
    learned = SimpleNamespace(max_position_embeddings=512)
    assert num_positions(nn.Module(), learned, 100) == 512
    assert num_positions(nn.Module(), SimpleNamespace(), 100) == 100
