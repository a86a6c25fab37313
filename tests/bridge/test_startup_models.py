"""Start-up: which models and caches are compressed, and which are refused with one sentence."""

import json

import pytest
from engine_job import MODEL
from startup import ON, engine_config, refusal

pytestmark = pytest.mark.vllm

DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("model_dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", ("auto", *DTYPES[1:]))
def test_the_cache_has_the_dtype_of_the_model(capsys, model_dtype, cache_dtype):
    flags = (*ON, "--dtype", model_dtype, "--kv-cache-dtype", cache_dtype)
    if cache_dtype in ("auto", model_dtype):
        assert engine_config(*flags).cache_config.cache_dtype == cache_dtype
        return
    own = "auto" if model_dtype == "float32" else model_dtype
    assert (
        f"--kv-cache-dtype {cache_dtype} for a model that runs in {model_dtype}; set it to {own}."
    ) in refusal(capsys, *flags)


@pytest.fixture(scope="module")
def eight_bit_checkpoint(tmp_path_factory):
    """A model of compressed-tensors that asks for a cache of 8 bits; its layers would obey."""
    folder = tmp_path_factory.mktemp("eight-bit")
    asked = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    scheme = {"quant_method": "compressed-tensors", "format": "dense", "kv_cache_scheme": asked}
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = {**scheme, "config_groups": {}, "ignore": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("dtype", "remedy"), [("bfloat16", "bfloat16"), ("float32", "bfloat16 and --dtype to bfloat16")]
)
def test_a_checkpoint_that_asks_for_another_cache_is_refused(
    capsys, eight_bit_checkpoint, dtype, remedy
):
    flags = (*ON, "--skip-tokenizer-init", "--dtype", dtype)
    assert (
        f"--kv-cache-dtype fp8, which the checkpoint asks for, on the CPU for a model that runs in "
        f"{dtype}; set it to {remedy}."
    ) in refusal(capsys, *flags, model=eight_bit_checkpoint)
    if dtype == remedy:
        named = engine_config(*flags, "--kv-cache-dtype", dtype, model=eight_bit_checkpoint)
        assert named.cache_config.cache_dtype == dtype


BASE = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
MODELS = {
    "multi-head latent attention (MLA)": {
        **BASE, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "n_routed_experts": 4, "first_k_dense_replace": 2,
    },
    "sliding-window attention": {
        **BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
        "sliding_window": 128,
    },
    "Mamba and other state-space": {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 512,
        "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16,
    },
}  # fmt: skip


@pytest.mark.parametrize("problem", list(MODELS))
def test_models_that_cannot_be_compressed_are_refused(capsys, tmp_path, problem):
    (tmp_path / "config.json").write_text(json.dumps(MODELS[problem]))
    message = refusal(capsys, *ON, "--skip-tokenizer-init", model=tmp_path)
    assert f"KV compression does not support {problem}" in message
    assert "without --kv-compression" in message
