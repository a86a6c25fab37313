"""Scores inside the engine equal those that plain transformers' keys, values and queries give."""

import numpy as np
import pytest
import torch
from engine_job import MODEL
from engine_scores import engine_scores
from transformers import AutoModelForCausalLM

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context
from vllm_kvzip.head_profiles.networks import MIN_LOG_SCORE, load_surrogate, token_features
from vllm_kvzip.model.rotary import unrotated
from vllm_kvzip.planning.prefix_seed import prefix_seed
from vllm_kvzip.profiling.probe_rotary import rotary_of

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

LAYERS, HEADS, GROUP, DIM = 4, 4, 2, 32


@pytest.fixture(scope="module")
def plain():
    """A prompt, transformers' cache of it, its queries before rotation, and the model."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    queries = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda _module, _inputs, output, index=index: queries.__setitem__(index, output[0])
        )
    prompt = make_context(np.random.default_rng(4), 610).tokens.tolist()
    with torch.inference_mode():
        cache = model(torch.tensor([prompt])).past_key_values
    return prompt, cache, queries, model


def scores_of(scorer, prompt, tmp_path, **engine):
    prefix = prompt[: len(prompt) // 32 * 32]
    scores, _ = engine_scores(tmp_path, [prompt], {"scorer": scorer, "keep_ratio": 0.5}, **engine)
    return scores[prefix_seed(prefix, len(prefix))], len(prefix)


@pytest.mark.parametrize("model_impl", ["vllm", "transformers"])
def test_surrogate(plain, tmp_path, model_impl):
    """Also where vLLM runs the model by transformers' code: the profile's, rotation and all."""
    prompt, cache, _, model = plain
    got, num_tokens = scores_of("surrogate", prompt, tmp_path, model_impl=model_impl)
    networks = load_surrogate(MODEL.parents[2] / "profiles" / "tiny-retriever.safetensors")
    rotary = rotary_of(model, num_tokens)
    for layer, (network, part) in enumerate(zip(networks, cache.layers, strict=True)):
        keys, values = part.keys[0, :, :num_tokens], part.values[0, :, :num_tokens]
        wanted = network.log_scores(token_features(unrotated(keys, rotary), values))
        torch.testing.assert_close(
            got[layer].log(), wanted.clamp(MIN_LOG_SCORE, 0), atol=2e-3, rtol=1e-3
        )


def test_expected_attention(plain, tmp_path):
    prompt, cache, queries, model = plain
    got, num_tokens = scores_of("expected-attention", prompt, tmp_path)
    end = len(prompt)
    positions = torch.arange(end, end + 512)[None]
    cos, sin = (part[0].mean(0) for part in model.model.rotary_emb(torch.zeros(1), positions))
    turn = torch.zeros(DIM, DIM)  # the mean rotation as a matrix
    for i in range(DIM // 2):
        j = i + DIM // 2
        turn[i, i], turn[i, j], turn[j, i], turn[j, j] = cos[i], -sin[i], sin[i], cos[i]
    for layer, part in enumerate(cache.layers):
        last = queries[layer][-128:].view(128, HEADS, GROUP, DIM)
        for head in range(HEADS):
            keys = part.keys[0, head, :num_tokens] * DIM**-0.5
            norms = part.values[0, head, :num_tokens].norm(dim=-1)
            attention = torch.zeros(num_tokens)
            for member in range(GROUP):
                mean = turn @ last[:, head, member].mean(0)
                covariance = turn @ torch.cov(last[:, head, member].T, correction=0) @ turn.T
                logits = keys @ mean + 0.5 * torch.einsum("td,de,te->t", keys, covariance, keys)
                attention += logits.softmax(0) / GROUP
            torch.testing.assert_close(got[layer, head], attention * norms, atol=1e-4, rtol=2e-3)
