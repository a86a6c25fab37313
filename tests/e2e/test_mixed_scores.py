"""Scores of full layers beside windows and states equal those of plain transformers' keys.

Such layers may have no rotary embedding where the windows have one, or another one.
"""

import numpy as np
import pytest
import torch
from engine_job import MODEL
from engine_scores import engine_scores
from random_model import KINDS, make_random_model
from transformers import AutoModelForCausalLM

from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY
from vllm_kvzip.model.attention_kinds import full_attention_layers
from vllm_kvzip.model.rotary import unrotated
from vllm_kvzip.planning.prefix_seed import prefix_seed
from vllm_kvzip.planning.reconstruction import iter_chunks
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


SINK_TOKENS = 4
REPEAT = [VOCABULARY.ids["repeat"]]
CHUNK_TOKENS = 256
KVZIP = {
    "scorer": "kvzip", "keep_ratio": 0.5, "profile": "none", "repeat_prompt": "repeat",
    "min_prompt_tokens": 32, "sink_tokens": SINK_TOKENS, "scoring_chunk_tokens": CHUNK_TOKENS,
    "prefix_reuse": "raw",
}  # fmt: skip


def attention_while_repeating(plain, context):
    """KVzip's scores ``[L, H, T]``: context and repeat prompt are one sequence for transformers."""
    scored, num_heads = full_attention_layers(plain.config), plain.config.num_key_value_heads
    length, scores = len(context), torch.zeros(len(scored), num_heads, len(context))
    for chunk in iter_chunks(context, CHUNK_TOKENS - len(REPEAT) - 8, REPEAT, REPEAT):
        ids = [*context, *chunk.input_ids]
        row, column = torch.arange(len(ids))[:, None], torch.arange(len(ids))
        is_past, is_chunk = column <= row, (column >= chunk.start) & (column < chunk.end)
        is_shown = (row < length) | (column >= length) | (column < SINK_TOKENS) | is_chunk
        is_near = row - column < plain.config.sliding_window
        masks = {"full_attention": is_past & is_shown, "sliding_attention": is_past & is_near}
        hide = torch.finfo(torch.float32).min
        masks = {kind: torch.where(seen, 0.0, hide)[None, None] for kind, seen in masks.items()}
        with torch.inference_mode():
            found = plain(torch.tensor([ids]), attention_mask=masks, output_attentions=True)
        for layer, index in enumerate(scored):
            weights = found.attentions[index][0, :, length:, chunk.start : chunk.end]
            best = weights.amax(dim=1).unflatten(0, (num_heads, -1)).amax(dim=1)
            scores[layer, :, chunk.start : chunk.end] = best
    return scores


@pytest.mark.parametrize("kind", ["gemma3", "gpt-oss"])
def test_the_model_repeats_a_context_with_its_windows(kind, tmp_path):
    """Where the context ends, what has been computed of it, and what is in the cache differ."""
    model, rng = make_random_model(kind, tmp_path), np.random.default_rng(11)
    known, unknown = (rng.integers(3, 500, 700).tolist() for _ in range(2))
    cases = [  # prompt, length of the declared context
        (known[:300], 160),  # more than the context is found in the cache
        (known[:640], 544),  # a part of it, and it waits without its last token
        (unknown[:290], None),
        (unknown[:576], None),  # likewise
        (unknown[:99] + unknown[:600], None),  # it waits behind its boundary
    ]
    scores, passes = engine_scores(
        tmp_path,
        [prompt for prompt, _ in cases],
        KVZIP,
        [{"kvzip_context_tokens": length} if length else {} for _, length in cases],
        before=[known[:320], known[:400]],
        model=str(model),
        tokenizer=str(MODEL),
        max_num_batched_tokens=256,
        max_model_len=740,
        num_gpu_blocks_override=90,  # blocks of the windows are soon written anew
        **KINDS[kind].engine,
    )
    assert len(passes) > 4  # not in one step
    plain = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="eager", dtype=torch.float32
    ).eval()
    for prompt, length in cases:
        prefix = prompt[: (length or len(prompt)) // 32 * 32]
        got = scores[prefix_seed(prefix, len(prefix))]
        wanted = attention_while_repeating(plain, prefix)
        torch.testing.assert_close(got, wanted, atol=5e-4, rtol=1e-3)
