"""Rotary angles and positions of a model: found beside its layers, or known to be missing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Cohere2Config, Gemma3TextConfig
from transformers.models.cohere2.modeling_cohere2 import Cohere2RotaryEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.passes.model_rotary import find_rotary, num_positions, tables_of

pytestmark = pytest.mark.vllm

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
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


def transformers_model(embedding):
    model = nn.Module()
    model.rotary_emb = embedding
    return model


def test_layers_of_the_transformers_backend_have_the_angles_of_their_type():
    config = Gemma3TextConfig(
        hidden_size=64, num_attention_heads=4, head_dim=16, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = transformers_model(Gemma3RotaryEmbedding(config))
    narrow, full = find_rotary(model, ["model.layers.0.attn", "model.layers.1.attn"], config)
    torch.testing.assert_close(narrow.sin[1], (10_000.0 ** -(torch.arange(8) / 8)).sin())
    torch.testing.assert_close(full.sin[1], (1_000_000.0 ** -(torch.arange(8) / 8)).sin())


def test_nobody_says_which_layers_of_cohere2_rotate_in_the_transformers_backend():
    config = Cohere2Config(hidden_size=64, num_attention_heads=4, num_hidden_layers=4)
    model = transformers_model(Cohere2RotaryEmbedding(config))
    with pytest.raises(UnsupportedError, match=r"rotary embedding of layer model\.layers\.3"):
        find_rotary(model, ["model.layers.3.attn"], config)


def test_a_model_without_rotation_has_none():
    assert find_rotary(nn.Module(), ["layers.0"], SimpleNamespace()) == [None]


def model_config(**text_config):
    return SimpleNamespace(max_model_len=100, hf_text_config=SimpleNamespace(**text_config))


def rotary_embedding(rope, max_model_len, *, is_neox_style=True):
    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=max_model_len)
    theta = 10_000.0 + max_model_len  # vLLM returns the same embedding for the same arguments
    with set_current_vllm_config(config):
        return get_rope(
            16,
            max_position=512,
            rope_parameters={"rope_theta": theta, **rope},
            is_neox_style=is_neox_style,
            dtype=torch.float32,
        )


@pytest.mark.parametrize(
    ("rope", "max_model_len", "is_neox_style"),
    [
        ({"rope_type": "default"}, 100, True),
        ({"rope_type": "default"}, 100, False),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, 100, True),
        (YARN, 100, True),
        (LONG_ROPE, 100, True),
        (LONG_ROPE, 300, True),
    ],
)
def test_what_the_model_rotates_is_turned_back(rope, max_model_len, is_neox_style):
    rotary = rotary_embedding(rope, max_model_len, is_neox_style=is_neox_style)
    positions = torch.arange(50, 90)
    keys = torch.randn(40, 2 * 16, generator=torch.manual_seed(0))
    turn = getattr(rotary, "forward_native", rotary.forward)
    _, rotated = turn(positions, keys.clone(), keys.clone())
    found = tables_of(rotary).unrotate(rotated.view(40, 2, 16).transpose(0, 1), positions)
    torch.testing.assert_close(found.transpose(0, 1).flatten(1), keys, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(rotated, keys, atol=0.1)


@pytest.mark.parametrize(
    ("rope", "max_model_len", "positions"),
    [
        ({"rope_type": "default"}, 100, 512),
        (YARN, 100, 512),
        (LONG_ROPE, 100, 128),
        (LONG_ROPE, 300, 512),
    ],
)
def test_positions_are_those_that_the_rotary_embedding_has(rope, max_model_len, positions):
    model = nn.ModuleList([nn.Linear(2, 2), rotary_embedding(rope, max_model_len)])
    assert num_positions(model, model_config(max_position_embeddings=7)) == positions


def test_positions_of_a_model_without_rotary_embedding():
    assert num_positions(nn.Module(), model_config(max_position_embeddings=512)) == 512
    assert num_positions(nn.Module(), model_config()) == 100
