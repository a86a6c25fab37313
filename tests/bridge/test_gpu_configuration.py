"""What an engine on an NVIDIA card would be configured to do; vLLM's platform stands in for one."""

import pytest
import torch
import vllm
from card import Hopper, pretend_a_card
from engine_job import MODEL
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder
from vllm.v1.kv_cache_interface import FullAttentionSpec

from vllm_kvzip.config import KVzipConfig
from vllm_kvzip.errors import KVzipError
from vllm_kvzip.vllm_bridge import platforms, stats_export
from vllm_kvzip.vllm_bridge.attention.gpu_attention import (
    HeadPageFlashBuilder,
    HeadPageTritonBackend,
)
from vllm_kvzip.vllm_bridge.start import checks, gpu_backend, options
from vllm_kvzip.vllm_bridge.worker.gpu_worker import compression_bytes

pytestmark = pytest.mark.vllm


@pytest.fixture
def stock_config():
    """vLLM's configuration without the plugin, of a block size that GPUs have."""
    return EngineArgs(model=str(MODEL), dtype="bfloat16", block_size=16).create_engine_config()


@pytest.fixture
def on_a_card(monkeypatch):
    pretend_a_card(monkeypatch)


def test_the_gpus_worker_and_a_backend_of_ours_are_chosen(stock_config, on_a_card):
    options.configure(stock_config, KVzipConfig(attention_kernel="triton"))
    assert stock_config.parallel_config.worker_cls == platforms.GPU.worker_class
    assert stock_config.attention_config.backend.name in platforms.GPU.attention_backends
    assert stock_config.cache_config.block_size == 16


def test_the_users_backend_stays(stock_config, on_a_card):
    stock_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN
    options.configure(stock_config, KVzipConfig())
    assert stock_config.attention_config.backend is AttentionBackendEnum.TRITON_ATTN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_is_taken_where_it_runs(stock_config, on_a_card, monkeypatch, dtype):
    from vllm.v1.attention.backends import fa_utils

    stock_config.model_config.dtype = dtype
    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    wanted = "TRITON_ATTN" if dtype is torch.float32 else "FLASH_ATTN"
    assert gpu_backend.default_gpu_backend(stock_config).name == wanted


OLD_CARD = r"before compute capability 8\.9 for a model that runs in bfloat16; set it to bfloat16\."
ELSE = " for a model that runs in bfloat16; set it to bfloat16 or fp8"


def change(config, path, value):
    *parents, name = path.split(".")
    for parent in parents:
        config = getattr(config, parent)
    setattr(config, name, value)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("cache_config.block_size", 48, "--block-size 48 on GPUs"),
        ("attention_config.backend", AttentionBackendEnum.FLASHINFER, "--attention-backend FLASHI"),
        (
            "cache_config.cache_dtype",
            "float16",
            f"--kv-cache-dtype float16{ELSE}",
        ),
        (
            "cache_config.cache_dtype",
            "fp8_per_token_head",
            f"--kv-cache-dtype fp8_per_token_head{ELSE}",
        ),
        (
            "cache_config.cache_dtype",
            "turboquant_k8v4",
            f"--kv-cache-dtype turboquant_k8v4{ELSE}",
        ),
        (
            "cache_config.cache_dtype",
            "fp8_e5m2",
            f"--kv-cache-dtype fp8_e5m2{ELSE}",
        ),
        ("cache_config.kv_cache_dtype_skip_layers", ["0"], "remove --kv-cache-dtype-skip-layers"),
        ("parallel_config.enable_dbo", True, "--enable-dbo"),
        ("attention_config.backend_per_kind", {"full_attention": 1}, "backend_per_kind"),
    ],
)
def test_what_gpus_cannot_do_is_one_sentence(stock_config, on_a_card, path, value, said):
    change(stock_config, path, value)
    with pytest.raises(KVzipError, match=said):
        checks.check_supported(stock_config)


def test_a_cache_of_eight_bits_needs_a_card_that_reads_it(stock_config, on_a_card, monkeypatch):
    stock_config.cache_config.cache_dtype = "fp8"
    checks.check_supported(stock_config)
    monkeypatch.setattr(Hopper, "get_device_capability", lambda device_id=0: DeviceCapability(8, 6))
    with pytest.raises(KVzipError, match=OLD_CARD):
        checks.check_supported(stock_config)


def test_flash_attention_is_not_taken_for_a_cache_that_it_does_not_read(
    stock_config, on_a_card, monkeypatch
):
    from vllm.v1.attention.backends import fa_utils, flash_attn

    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    stock_config.cache_config.cache_dtype = "fp8"
    for reads, wanted in ((False, "TRITON_ATTN"), (True, "FLASH_ATTN")):
        monkeypatch.setattr(
            flash_attn,
            "flash_attn_supports_kv_cache_dtype",
            lambda *cache, reads=reads, **how: reads,
        )
        assert gpu_backend.default_gpu_backend(stock_config).name == wanted


def test_vllms_kernel_does_not_read_eight_bits_over_pairs(stock_config, on_a_card):
    stock_config.cache_config.cache_dtype = "fp8"
    with pytest.raises(KVzipError, match="attention_kernel vllm does not work with --kv-cache-dty"):
        options.configure(stock_config, KVzipConfig(attention_kernel="vllm"))


def test_formats_that_save_nothing_over_eight_bits_are_refused(stock_config, on_a_card):
    stock_config.cache_config.cache_dtype = "fp8"
    with pytest.raises(KVzipError, match="int8"):
        wide = KVzipConfig(mode="quantize", key_format="int8", value_format="int8")
        options.configure(stock_config, wide)


def test_capped_and_learned_logits_are_not_refused(stock_config, on_a_card):
    stock_config.model_config.hf_text_config.attn_logit_softcapping = 50.0
    stock_config.model_config.hf_text_config.attention_sinks = True
    options.configure(stock_config, KVzipConfig())
    assert "HeadPageGPUWorker" in stock_config.parallel_config.worker_cls


def test_vllms_kernel_does_not_take_learned_logits(stock_config, on_a_card):
    stock_config.model_config.hf_text_config.attention_sinks = True
    with pytest.raises(KVzipError, match="vllm does not work with learned attention sinks yet"):
        options.configure(stock_config, KVzipConfig(attention_kernel="vllm"))


def test_flash_attention_is_asked_for_learned_logits(stock_config, on_a_card, monkeypatch):
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    asked = []

    def refuse(**combination):
        asked.append(combination["has_sink"])
        return "no"

    monkeypatch.setattr(fa_utils, "is_flash_attn_varlen_func_available", lambda: True)
    monkeypatch.setattr(FlashAttentionBackend, "supports_combination", refuse)
    for has_sinks in (False, True):
        stock_config.model_config.hf_text_config.attention_sinks = has_sinks
        gpu_backend.default_gpu_backend(stock_config)
    assert asked == [False, True]


def test_batch_invariance_is_refused(stock_config, on_a_card, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(KVzipError, match="VLLM_BATCH_INVARIANT"):
        checks.check_supported(stock_config)


def test_cascade_attention_is_refused_where_vllm_has_it(stock_config, on_a_card, monkeypatch):
    stock_config.model_config.disable_cascade_attn = False
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    with pytest.raises(KVzipError, match="cascade attention; remove --no-disable-cascade-attn"):
        checks.check_supported(stock_config)
    monkeypatch.setattr(vllm, "__version__", "0.32.0")
    checks.check_supported(stock_config)


def test_other_platforms_are_refused(stock_config, monkeypatch):
    class Elsewhere(Platform):
        _enum = PlatformEnum.ROCM
        device_name = "another card"

    monkeypatch.setattr(platforms, "current_platform", Elsewhere())
    with pytest.raises(KVzipError, match="NVIDIA GPUs and on CPUs"):
        checks.check_supported(stock_config)


def test_a_choice_of_kernel_is_refused_on_the_cpu(stock_config):
    with pytest.raises(KVzipError, match="attention_kernel triton is a choice for GPUs"):
        checks.check_attention_kernel(KVzipConfig(attention_kernel="triton"), "auto")
    checks.check_attention_kernel(KVzipConfig(attention_kernel="auto"), "auto")


@pytest.mark.parametrize(
    ("scorer", "support"),
    [("keydiff", AttentionCGSupport.UNIFORM_BATCH), ("window", AttentionCGSupport.NEVER)],
)
def test_full_graphs_of_decode_steps_unless_queries_are_watched(
    stock_config, on_a_card, scorer, support
):
    options.configure(stock_config, KVzipConfig(scorer=scorer))
    for builder in (HeadPageFlashBuilder, HeadPageTritonBackend.get_builder_cls()):
        assert builder.get_cudagraph_support(stock_config, None) is support


def test_a_drafts_metadata_is_made_anew_for_each_of_its_steps(stock_config, on_a_card):
    """vLLM's Triton and FlashAttention builders would change their own in place."""
    options.configure(stock_config, KVzipConfig())
    spec = FullAttentionSpec(block_size=16, num_kv_heads=4, head_size=32, dtype=torch.bfloat16)
    builder_class = HeadPageTritonBackend.get_builder_cls()
    for cls, updates in ((builder_class, False), (TritonAttentionMetadataBuilder, True)):
        builder = cls(spec, ["layer"], stock_config, torch.device("cpu"))
        assert builder.supports_draft_decode_metadata_update is updates


def test_engines_of_one_configuration_share_vllms_cache_of_compiled_models(on_a_card):
    """vLLM names it by a hash of the configuration: nothing in there may change from run to run."""
    hashes = set()
    for _ in range(2):
        config = EngineArgs(model=str(MODEL), dtype="bfloat16", block_size=16)
        config = config.create_engine_config()
        stats_export._directory = None  # as in another process
        options.configure(config, KVzipConfig())
        hashes.add(config.compute_hash())
    assert len(hashes) == 1


def test_room_for_compressing_grows_with_the_longest_prompt():
    """Of Llama-3.1-8B: 1.1 GiB for 32,768 tokens; more than the scores and their order alone."""
    room = compression_bytes(32, 8, 128, 32768)
    assert compression_bytes(32, 8, 128, 65536) == 2 * room
    assert 2**28 < compression_bytes(32, 8, 128, 32768, page_tokens=60) - room < 2**29
    assert 32 * 8 * 32768 * 40 < room < 2 * 2**30


def test_a_mixture_of_experts_does_not_repeat_its_context_on_one_rank_alone(stock_config):
    class Experts(type(stock_config.model_config)):
        is_moe = True

    stock_config.model_config.__class__ = Experts
    checks.check_scoring_passes(stock_config, "kvzip")
    stock_config.parallel_config.data_parallel_size = 2
    with pytest.raises(KVzipError, match="--data-parallel-size"):
        checks.check_scoring_passes(stock_config, "kvzip")
