"""Start-up: which models and caches are compressed, and which are refused with one sentence."""

import json

import pytest
import torch
import transformers
from engine_job import MODEL
from pydantic import ValidationError
from random_model import KINDS, SHAPE
from startup import ON, engine_config, refusal
from vllm.transformers_utils.configs.minimax_m3 import MiniMaxM3TextConfig
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    SlidingWindowSpec,
)

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.evaluation.model_files import fingerprint_from_config
from vllm_kvzip.model.attention_kinds import has_sinks, unusual_attention
from vllm_kvzip.vllm_bridge.attention.cpu_attention import HeadPageCPUImpl
from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec, as_head_page_specs
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_layers
from vllm_kvzip.vllm_bridge.fingerprint import compressed_layers, model_fingerprint
from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.symbols import is_before

pytestmark = pytest.mark.vllm


class Layer:
    """As much of vLLM's attention layer as the checks look at."""

    num_heads = 4
    kv_sharing_target_layer_name = None

    def __init__(self, **changed):
        self.impl = object.__new__(HeadPageCPUImpl)
        self.__dict__.update(changed)


def full_attention(**changed):
    shape = {"block_size": 32, "num_kv_heads": 4, "head_size": 32, "dtype": torch.float32}
    return FullAttentionSpec(**{**shape, **changed})


def sliding(window):
    return SlidingWindowSpec(
        block_size=16, num_kv_heads=4, head_size=32, dtype=torch.float32, sliding_window=window
    )


DTYPES = ("float32", "float16", "bfloat16")


@pytest.mark.parametrize("model_dtype", DTYPES)
@pytest.mark.parametrize("cache_dtype", ("auto", *DTYPES[1:]))
def test_the_cache_has_the_dtype_of_the_model(capsys, model_dtype, cache_dtype):
    flags = (*ON, "--dtype", model_dtype, "--kv-cache-dtype", cache_dtype)
    if cache_dtype in ("auto", model_dtype):
        assert engine_config(*flags).cache_config.cache_dtype == cache_dtype
        return
    own = "auto" if model_dtype == "float32" else model_dtype
    if not is_before((0, 33)):  # from then on vLLM refuses it itself
        with pytest.raises(ValidationError, match="is incompatible with dtype"):
            engine_config(*flags)
        return
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
LLAMA = {**BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
MODELS = {
    "multi-head latent attention (MLA)": {
        **BASE, "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2",
        "kv_lora_rank": 64, "q_lora_rank": None, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "n_routed_experts": 4, "first_k_dense_replace": 2,
    },
    "models whose layers all have a sliding window": {
        **BASE, "architectures": ["MistralForCausalLM"], "model_type": "mistral",
        "sliding_window": 128,
    },
    "models without attention, whose layers hold no KV pairs": {
        "architectures": ["MambaForCausalLM"], "model_type": "mamba", "vocab_size": 512,
        "hidden_size": 128, "num_hidden_layers": 2, "state_size": 16,
    },
    "block-sparse attention": {
        **LLAMA, "sparse_attention_config": {"sparse_attention_freq": [0, 1]},
    },
    "value heads of 16 beside key heads of 32": {**LLAMA, "v_head_dim": 16},
    "layers that share another layer's KV cache": {**LLAMA, "num_kv_shared_layers": 1},
    "layers of different KV heads or head sizes": {**LLAMA, "global_head_dim": 64},
    "ALiBi": {
        "architectures": ["BloomForCausalLM"], "model_type": "bloom", "vocab_size": 512,
        "hidden_size": 128, "n_layer": 2, "n_head": 4,
    },
    "chunked local attention": {
        **LLAMA, "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text",
        "layer_types": ["chunked_attention", "full_attention"], "attention_chunk_size": 64,
        "num_local_experts": 2, "intermediate_size_mlp": 256, "head_dim": 32,
    },
    "multi-head latent attention (MLA); run DeepseekV32": {
        **BASE, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32",
        "kv_lora_rank": 64, "q_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32,
        "v_head_dim": 32, "n_routed_experts": 4, "first_k_dense_replace": 2, "index_topk": 64,
        "index_n_heads": 2, "index_head_dim": 32,
    },
    "layers of kind compressed_sparse_attention": {
        **LLAMA, "layer_types": ["full_attention", "compressed_sparse_attention"],
    },
    "layers of kind hybrid": {
        **BASE, "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1",
        "mamba_d_ssm": 256, "mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16,
        "mamba_n_groups": 1,
    },
    "models without a layer that attends to the whole context": {
        **BASE, "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next",
        "layer_types": ["linear_attention"] * 2, "head_dim": 32,
    },
    "learned keys and values before the first token": {**LLAMA, "param_sink_number": 2},
}  # fmt: skip


WINDOWED = {
    "Phi3ForCausalLM": {"model_type": "phi3", "pad_token_id": 0},
    "MistralForCausalLM": {"model_type": "mistral"},
    "Qwen2ForCausalLM": {
        "model_type": "qwen2", "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "Gemma2ForCausalLM": {"model_type": "gemma2", "head_dim": 32},
}  # fmt: skip
MIXED = ("Qwen2ForCausalLM", "Gemma2ForCausalLM")
"""Only some of their layers have the window."""


@pytest.mark.parametrize("architecture", list(WINDOWED))
def test_a_window_that_holds_the_longest_request_slides_nowhere(capsys, tmp_path, architecture):
    kind = {"architectures": [architecture], "sliding_window": 512}
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **WINDOWED[architecture], **kind}))
    flags = (*ON, "--skip-tokenizer-init", "--max-model-len")
    fits = engine_config(*flags, "512", model=tmp_path)
    assert fits.model_config.get_sliding_window() == 512
    specs = as_head_page_specs(
        {
            "narrow": sliding(512),
            "full": full_attention(),
        },
        {"narrow": Layer(), "full": Layer()},
        Settings.from_vllm_config(fits),
        fits,
    )
    assert specs["narrow"] == specs["full"]
    if architecture in MIXED:
        assert model_fingerprint(fits).num_layers == 2
        slides = engine_config(*flags, "513", model=tmp_path)
        assert model_fingerprint(slides).num_layers == 1
        return
    assert (
        f"models whose layers all have a sliding window; set --max-model-len to 512 or less, or "
        f"run {architecture} without --kv-compression"
    ) in refusal(capsys, *flags, "513", model=tmp_path)


def test_windows_beside_full_attention_need_groups_of_their_own(capsys, tmp_path):
    kind = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128}
    config = {**BASE, **WINDOWED["Qwen2ForCausalLM"], **kind}
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = (*ON, "--skip-tokenizer-init")
    settings = engine_config(*flags, model=tmp_path)
    assert compressed_layers(settings) == [0]
    assert "remove --disable-hybrid-kv-cache-manager." in refusal(
        capsys, *flags, "--disable-hybrid-kv-cache-manager", model=tmp_path
    )
    repeating = (*ON, "--tokenizer", str(MODEL), "--kv-compression-config.scorer", "kvzip")
    assert Settings.from_vllm_config(engine_config(*repeating, model=tmp_path)).repeat_ids
    specs = {"narrow": sliding(128), "full": full_attention()}
    made = as_head_page_specs(
        specs, dict.fromkeys(specs, Layer()), Settings.from_vllm_config(settings), settings
    )
    assert made["narrow"] is specs["narrow"]
    assert type(made["full"]) is HeadPageSpec


def test_models_with_states_are_not_run_beside_vllms_steps(capsys, tmp_path):
    kind = KINDS["lfm2"]
    config = kind.config_class(**{**SHAPE, **kind.fields}, num_hidden_layers=4)
    config.architectures = ["Lfm2ForCausalLM"]
    config.save_pretrained(tmp_path)
    setting = "--kv-compression-config."
    assert (
        "Scorer kvzip does not work with layers that hold a state beside full attention yet; "
        "choose surrogate with a profile of `vllm-kvzip profile`, or contrast or keydiff without "
        "one."
    ) in refusal(capsys, *ON, f"{setting}scorer", "kvzip", model=tmp_path)
    assert (
        "profile build does not work with layers that hold a state yet; build the profile with "
        "`vllm-kvzip profile`, or set profile to auto."
    ) in refusal(capsys, *ON, f"{setting}profile", "build", model=tmp_path)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 6, 12])
def test_ranks_share_or_repeat_the_kv_heads(capsys, tmp_path, num_ranks):
    heads = {"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 384}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **heads}))
    flags = (*ON, "--skip-tokenizer-init", "--tensor-parallel-size", str(num_ranks))
    if num_ranks in (1, 2, 4, 12):
        assert engine_config(*flags, model=tmp_path).parallel_config.worker_cls
        return
    assert (
        f"--tensor-parallel-size {num_ranks} for 4 KV heads; choose a divisor or a multiple of 4"
    ) in refusal(capsys, *flags, model=tmp_path)


@pytest.mark.parametrize("problem", list(MODELS))
def test_models_that_cannot_be_compressed_are_refused(capsys, tmp_path, problem):
    (tmp_path / "config.json").write_text(json.dumps(MODELS[problem]))
    message = refusal(capsys, *ON, "--skip-tokenizer-init", model=tmp_path)
    assert f"KV compression does not support {problem}" in message
    assert "without --kv-compression" in message


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (MiniMaxM3TextConfig(), "block-sparse attention"),
        (transformers.FalconConfig(alibi=True), "ALiBi"),
        (transformers.MptConfig(), "ALiBi"),
        (transformers.Gemma3nTextConfig(), "layers that share another layer's KV cache"),
        (
            transformers.LlamaConfig(
                block_configs=[{"attention": {"n_heads_in_group": n}} for n in (4, 8)]
            ),
            "layers of different KV heads or head sizes",
        ),
    ],
)
def test_unusual_attention_is_found_in_configurations(config, problem):
    assert problem in unusual_attention(config)


def test_usual_attention_is_not_refused():
    """Of models with fields that look as if."""
    for config in (
        transformers.FalconConfig(),
        transformers.LlamaConfig(
            block_configs=[{"attention": a} for a in ({"n_heads_in_group": 8}, {"no_op": True})]
        ),
        transformers.DeepseekV3Config(),  # refused for its latent attention
        MiniMaxM3TextConfig(sparse_attention_config={"sparse_attention_freq": [0] * 60}),
        transformers.GraniteConfig(),
        transformers.GptOssConfig(),
        transformers.Phi3Config(),
        transformers.Qwen3Config(),
    ):
        assert unusual_attention(config) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (transformers.GptOssConfig(), True),
        (transformers.LlamaConfig(attention_sinks=True), True),
        (transformers.LlamaConfig(add_full_attention_sink_bias=True), True),
        (transformers.GraniteConfig(), False),
        (transformers.GraniteConfig(layer_types=["full_attention"] * 32), True),
        (transformers.GraniteMoeHybridConfig(), False),
        (transformers.Gemma2Config(), False),
    ],
)
def test_learned_logits_are_found_in_configurations(config, expected):
    assert has_sinks(config) == expected


def test_what_capped_logits_do_not_go_with_is_refused(capsys, tmp_path):
    kind = {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "head_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps({**BASE, **kind, "sliding_window": 1024}))
    flags = (*ON, "--skip-tokenizer-init", "--max-model-len", "512")
    assert engine_config(*flags, model=tmp_path)
    assert engine_config(*flags, "--kv-compression-config.mode", "quantize", model=tmp_path)
    scorer = "--kv-compression-config.scorer"
    assert engine_config(*flags, scorer, "window", model=tmp_path)
    assert (
        "Scorer expected-attention does not work with capped attention logits yet; choose contrast "
        "or window."
    ) in refusal(capsys, *flags, scorer, "expected-attention", model=tmp_path)


@pytest.mark.parametrize(
    ("spec", "layer", "problem"),
    [
        (full_attention(head_size_v=16), Layer(), "value heads of 16 beside key heads of 32"),
        (full_attention(num_kv_heads=2), Layer(), "other heads than the layers before it"),
        (full_attention(), Layer(num_heads=8), "other heads than the layers before it"),
        (full_attention(sliding_window=64), Layer(), "FullAttentionSpec, which is no full att"),
        (full_attention(non_causal=True), Layer(), "FullAttentionSpec, which is no full attention"),
        (
            ChunkedLocalAttentionSpec(
                block_size=32,
                num_kv_heads=4,
                head_size=32,
                dtype=torch.float32,
                attention_chunk_size=64,
            ),
            Layer(),
            "ChunkedLocalAttentionSpec, which is no full attention",
        ),
        (full_attention(), Layer(impl=object()), "an attention of its own, Layer"),
        (None, Layer(kv_sharing_target_layer_name="a"), "the KV cache of layer a"),
    ],
)
def test_layers_that_no_configuration_tells_of_are_refused_once_loaded(spec, layer, problem):
    config = engine_config(*ON)
    specs, layers = {"a": full_attention()}, {"a": Layer()}
    check_layers(specs, layers, config)
    specs |= {} if spec is None else {"b": spec}
    with pytest.raises(UnsupportedError, match=f"not support layer b: it has {problem}.*; run Ll"):
        check_layers(specs, layers | {"b": layer}, config)


@pytest.mark.parametrize(
    ("values", "layers", "kv_heads"),
    [
        ({"num_key_value_heads": 2}, 3, 2),
        ({}, 3, 8),
        (
            {
                "num_key_value_heads": None,
                "block_configs": [
                    {"attention": {"no_op": True}},
                    {"attention": {"n_heads_in_group": 4}},
                    {"attention": {"n_heads_in_group": 4, "no_op": False}},
                ],
            },
            2,
            2,
        ),
    ],
    ids=["groups", "no groups", "a layer without attention"],
)
def test_a_profile_has_a_row_for_every_layer_with_attention(values, layers, kv_heads):
    config = transformers.LlamaConfig(
        num_hidden_layers=3, num_attention_heads=8, hidden_size=64, architectures=["A"], **values
    )
    found = fingerprint_from_config(config, "m")
    assert (found.num_layers, found.num_kv_heads, found.head_dim) == (layers, kv_heads, 8)
