"""Scores of full layers beside windows and states equal those of plain transformers' keys.

Such layers may have no rotary embedding where the windows have one, or another one.
"""

import numpy as np
import pytest
import torch
from engine_job import engine_scores
from random_model import KINDS, make_random_model
from transformers import AutoModelForCausalLM

from vllm_kvzip.model.attention_kinds import full_attention_layers
from vllm_kvzip.model.rotary import unrotated
from vllm_kvzip.planning.prefix_seed import prefix_seed
from vllm_kvzip.profiling.context_cache import layers_of
from vllm_kvzip.profiling.probe_rotary import rotary_of
from vllm_kvzip.scoring.contrast import contrast, value_power

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

KEEP_RATIO = 0.25
TOKENS = {
    "cohere2": 64,  # from there on vLLM's window is one token wider than transformers'
    "qwen3-next": 320,  # two blocks
}
NUMBERS = {"qwen3-next": (0.3, 0.05), "nemotron-h": (0.05, 0.05)}
"""How far scores may be away from transformers', and in relation: of a model that vLLM runs in 16
bits, and of one whose state-space layers sum up in another order."""


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_default_scorer_without_a_profile(kind, tmp_path):
    model = make_random_model(kind, tmp_path)
    count = TOKENS.get(kind, 192)
    prompt = np.random.default_rng(3).integers(3, 500, count + 5).tolist()
    # A tiny model whose profile ships has the shape of one of these.
    settings = {"keep_ratio": KEEP_RATIO, "min_prompt_tokens": 32, "profile": "none"}
    engine = {"model": str(model), "skip_tokenizer_init": True, **KINDS[kind].engine}
    scores, _ = engine_scores(tmp_path, [prompt], settings, **engine)
    plain = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="eager", dtype=torch.float32
    ).eval()
    scored = full_attention_layers(plain.config)
    rotary = rotary_of(plain, count, scored)
    prefix = prompt[:count]
    with torch.inference_mode():
        cache = layers_of(plain(torch.tensor([prefix])).past_key_values, scored)
    got = scores[prefix_seed(prefix, count)]
    assert len(got) == len(scored)
    for row, (keys, values) in zip(got, cache, strict=True):
        wanted = contrast(unrotated(keys, rotary), values, value_power(KEEP_RATIO))
        atol, rtol = NUMBERS.get(kind, (2e-3, 1e-2))
        torch.testing.assert_close(row, wanted, atol=atol, rtol=rtol)
