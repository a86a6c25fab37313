"""What an engine finds while its model reads and repeats contexts, beside sliding windows."""

import json
import shutil
from pathlib import Path

import calibration_job
import numpy as np
import pytest
import torch
from engine_job import MODEL
from forked_script import ENGINES, run_script
from random_model import KINDS, make_random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_kvzip.head_profiles.repeat_prompt import repeat_wording
from vllm_kvzip.model.attention_kinds import full_attention_layers
from vllm_kvzip.planning.reconstruction import iter_chunks

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

WINDOWED = ["gemma2", "gpt-oss", "olmo3", "exaone4"]


@pytest.fixture(scope="module", params=WINDOWED)
def model(request, tmp_path_factory):
    folder = make_random_model(request.param, tmp_path_factory.mktemp("models"))
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def calibration_scores(folder, model, contexts):
    """Of each context ``[L, H, T]``, by a fresh engine."""
    settings = {"repeat_prompt": "repeat", "scoring_chunk_tokens": 1024}
    engine = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "block_size": 32,
        "gpu_memory_utilization": 0.3, "additional_config": {"kvzip": settings},
        **KINDS[model.name].engine,
    }  # fmt: skip
    job, answer = folder / "job.json", folder / "answer.pt"
    job.write_text(json.dumps({"engine": engine, "contexts": contexts}))
    environment = {**ENGINES, "TMPDIR": str(folder)}
    script = Path(calibration_job.__file__)
    done = run_script(script, str(job), str(answer), environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(answer)


def test_scores_are_the_attention_of_plain_transformers(model, tmp_path):
    """One pass over context and repeated text; windows slide within both, and within the first."""
    rng = np.random.default_rng(2)
    contexts = [rng.integers(7, 500, n).tolist() for n in (300, 20)]
    found = calibration_scores(tmp_path, model, contexts)
    plain = AutoModelForCausalLM.from_pretrained(
        model, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    prompt = repeat_wording("repeat", None, tokenizer).token_ids(tokenizer)
    for context, got in zip(contexts, found, strict=True):
        (chunk,) = iter_chunks(context, 1024, *prompt)
        with torch.inference_mode():
            ids = torch.tensor([[*context, *chunk.input_ids]])
            attentions = plain(ids, output_attentions=True, use_cache=False).attentions
        full = full_attention_layers(plain.config)
        assert len(got) == len(full)
        for row, layer in zip(got, full, strict=True):
            best = attentions[layer][0, :, len(context) :, : len(context)].amax(1)
            wanted = best.unflatten(0, (len(row), -1)).amax(1)
            torch.testing.assert_close(row, wanted, atol=5e-4, rtol=2e-2)
