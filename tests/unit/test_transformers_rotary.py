"""Angles of transformers' rotary embeddings: what the model turns is turned back."""

import pytest
import torch
from transformers import CohereConfig, Gemma3TextConfig, GlmConfig, GptOssConfig, LlamaConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm import modeling_glm
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from vllm_kvzip.model.transformers_rotary import transformers_tables

SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "pad_token_id": None}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}


@pytest.mark.parametrize(
    ("room", "embedding"),
    [
        (modeling_llama, modeling_llama.LlamaRotaryEmbedding(LlamaConfig(**SHAPE))),
        (
            modeling_llama,
            modeling_llama.LlamaRotaryEmbedding(
                LlamaConfig(**SHAPE, max_position_embeddings=512, rope_parameters=YARN)
            ),
        ),
        (modeling_glm, modeling_glm.GlmRotaryEmbedding(GlmConfig(**SHAPE))),
        (modeling_cohere, modeling_cohere.CohereRotaryEmbedding(CohereConfig(**SHAPE))),
        (modeling_gpt_oss, modeling_gpt_oss.GptOssRotaryEmbedding(GptOssConfig(**SHAPE))),
    ],
)
def test_what_the_model_turns_is_turned_back(room, embedding):
    positions = torch.arange(90)
    keys = torch.randn(1, 3, 90, 16, generator=torch.Generator().manual_seed(1))
    cos, sin = embedding(torch.zeros(1), positions[None])
    _, rotated = room.apply_rotary_pos_emb(keys, keys, cos, sin)
    assert not torch.allclose(rotated, keys, atol=0.1)
    found = transformers_tables(embedding, 90).unrotate(rotated[0], positions)
    torch.testing.assert_close(found, keys[0], atol=1e-4, rtol=1e-4)


def test_angles_that_depend_on_the_length_are_not_told():
    config = LlamaConfig(**SHAPE, max_position_embeddings=64, rope_parameters=DYNAMIC)
    assert transformers_tables(modeling_llama.LlamaRotaryEmbedding(config), 90) is None


@pytest.mark.parametrize("layer_type", ["full_attention", "sliding_attention"])
def test_a_model_can_have_angles_for_each_type_of_layer(layer_type):
    embedding = modeling_gemma3.Gemma3RotaryEmbedding(Gemma3TextConfig(**SHAPE))
    positions = torch.arange(90)
    keys = torch.randn(1, 3, 90, 16, generator=torch.Generator().manual_seed(1))
    cos, sin = embedding(torch.zeros(1), positions[None], layer_type)
    _, rotated = modeling_gemma3.apply_rotary_pos_emb(keys, keys, cos, sin)
    found = transformers_tables(embedding, 90, layer_type)
    torch.testing.assert_close(found.unrotate(rotated[0], positions), keys[0], atol=1e-4, rtol=1e-4)
    others = {"full_attention", "sliding_attention"} - {layer_type}
    other = transformers_tables(embedding, 90, *others)
    assert not torch.allclose(other.unrotate(rotated[0], positions), keys[0], atol=0.1)
