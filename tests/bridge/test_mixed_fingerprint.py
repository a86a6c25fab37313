"""A profile that is made offline for a model of several kinds of layers is found by an engine."""

import pytest
import transformers
from random_model import FULL, KINDS, SHAPE, SLIDING, Kind
from startup import ON, engine_config

from vllm_kvzip.evaluation.model_files import fingerprint_from_config
from vllm_kvzip.vllm_bridge.fingerprint import compressed_layers, model_fingerprint

pytestmark = pytest.mark.vllm

ARCHITECTURES = {
    "gemma3": "Gemma3ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
    "exaone4": "Exaone4ForCausalLM",
    "lfm2": "Lfm2ForCausalLM",
    "qwen3-next": "Qwen3NextForCausalLM",
    "granite4-h": "GraniteMoeHybridForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "ministral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
OTHERS = {
    "ministral": Kind(
        transformers.MinistralConfig, {"sliding_window": 64, "layer_types": [SLIDING, FULL] * 2}
    ),
    "qwen2": Kind(
        transformers.Qwen2Config,
        {
            "sliding_window": 64, "layer_types": [FULL] * 2 + [SLIDING] * 2,
            "use_sliding_window": True,
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_scripts_and_engine_count_the_same_layers(kind, tmp_path):
    made = {**KINDS, **OTHERS}[kind]
    types = made.fields["layer_types"]
    fields = {**SHAPE, "num_hidden_layers": len(types), **made.fields}
    config = made.config_class(**fields, architectures=[ARCHITECTURES[kind]])
    config.save_pretrained(tmp_path)
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    offline = fingerprint_from_config(read, "m")
    engine = engine_config(*ON, "--skip-tokenizer-init", model=tmp_path)
    found = model_fingerprint(engine)
    assert offline.mismatch(found) is None
    assert offline.num_layers == len(compressed_layers(engine)) < len(types)
