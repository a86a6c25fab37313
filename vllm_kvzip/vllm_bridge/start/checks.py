"""What cannot be combined with KV compression, said at start-up in one sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvzip.errors import ConfigError, UnsupportedError
from vllm_kvzip.model.attention_kinds import (
    STATE_KINDS,
    VARIED,
    layers_by_kind,
    slides_within,
    sliding_window,
    unknown_kinds,
    unusual_attention,
)
from vllm_kvzip.vllm_bridge.connectors.accepted import connector_problems
from vllm_kvzip.vllm_bridge.drafts import has_draft_layers
from vllm_kvzip.vllm_bridge.fingerprint import compressed_layers
from vllm_kvzip.vllm_bridge.fp8_cache import (
    FP8_CACHES,
    FP8_CAPABILITY,
    running_cache_dtype,
)
from vllm_kvzip.vllm_bridge.platforms import running_platform, unserved_device
from vllm_kvzip.vllm_bridge.start.cache_plan import CachePlan, plan_cache
from vllm_kvzip.vllm_bridge.start.parallel_checks import parallel_problems
from vllm_kvzip.vllm_bridge.start.speculation import speculation_problems
from vllm_kvzip.vllm_bridge.symbols import current_platform, envs
from vllm_kvzip.vllm_bridge.versions import has_cascade_attention

if TYPE_CHECKING:
    from vllm_kvzip.config import KVzipConfig
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

STOCK_WORKERS = ("auto", "vllm.v1.worker.cpu_worker.CPUWorker", "vllm.v1.worker.gpu_worker.Worker")
SIZES = {"head_size", "total_num_kv_heads", "total_num_attention_heads"}


def check_supported(vllm_config: VllmConfig) -> CachePlan:
    """Refuse what does not work yet.

    Returns:
        what vLLM will make of the model's layers.

    Raises:
        UnsupportedError: names the model property or the flag, and what to do.
    """
    for problems in (_model_problems, _engine_problems):  # a plan needs what these let through
        _refuse(problems(vllm_config))
    plan = plan_cache(vllm_config)
    _refuse(_plan_problems(plan))
    return plan


def _refuse(problems: list[str]) -> None:
    for problem in problems:
        raise UnsupportedError(f"KV compression does not support {problem}.")


def check_scoring_passes(vllm_config: VllmConfig, scorer: str) -> None:
    """Refuse what keeps the model from running once more over its context.

    Raises:
        UnsupportedError: names the model property or the flag, and what to do.
    """
    states = ["layers that hold a state beside full attention"] if _has_states(vllm_config) else []
    for what in states + _stages(vllm_config):
        raise UnsupportedError(
            f"Scorer {scorer} does not work with {what} yet; choose surrogate with a profile of "
            f"`vllm-kvzip profile`, or contrast or keydiff without one."
        )
    for what in _pass_problems(vllm_config):
        raise UnsupportedError(
            f"Scorer {scorer} does not work with {what} yet; choose another scorer."
        )


def check_profile_build(vllm_config: VllmConfig) -> None:
    """Refuse what keeps an engine from making a head profile when it starts.

    Raises:
        UnsupportedError: names the model property or the flag, and what to do.
    """
    states = ["layers that hold a state"] if _has_states(vllm_config) else []
    drafts = ["a draft model"] if has_draft_layers(vllm_config) else []
    for what in states + drafts + _stages(vllm_config) + _pass_problems(vllm_config):
        raise UnsupportedError(
            f"profile build does not work with {what} yet; build the profile with "
            f"`vllm-kvzip profile`, or set profile to auto."
        )


def _stages(vllm_config: VllmConfig) -> list[str]:
    """Pipeline stages, if there are any: none of them can run the whole model."""
    size = vllm_config.parallel_config.pipeline_parallel_size
    return [f"--pipeline-parallel-size {size}"] if size > 1 else []


def _pass_problems(vllm_config: VllmConfig) -> list[str]:
    model = vllm_config.model_config
    problems = [
        (vllm_config.lora_config is not None, "--enable-lora"),
        (model.is_multimodal_model, f"multimodal models such as {model.architecture}"),
        (getattr(model, "enable_prompt_embeds", False), "--enable-prompt-embeds"),
        (model.skip_tokenizer_init, "--skip-tokenizer-init"),
        (
            vllm_config.parallel_config.data_parallel_size > 1 and model.is_moe,
            "--data-parallel-size for mixture-of-experts models, whose ranks step together",
        ),
    ]
    return [what for present, what in problems if present]


def check_budget_in_tokens(name: str, vllm_config: VllmConfig, scorer: str, competes: bool) -> None:
    """Refuse what cannot be combined with a prefill budget or a decode budget.

    Args:
        name: of the setting.
        vllm_config: of the engine.
        scorer: its name.
        competes: whether that scorer compares kept pairs with new ones: its scores are comparable
            across parts, or it scores what is kept anew.

    Raises:
        ConfigError: naming the setting.
    """
    if not competes:
        raise ConfigError(
            f"Scorer {scorer} does not work with {name}: its scores of one part of a "
            f"prompt cannot be compared with those of another; choose keydiff, surrogate or "
            f"profile."
        )
    if has_draft_layers(vllm_config):
        raise ConfigError(
            f"{name} does not work with speculative method "
            f"{vllm_config.speculative_config.method} yet; use ngram, or remove one of them."
        )


def _model_problems(vllm_config: VllmConfig) -> list[str]:
    model = vllm_config.model_config
    text_config: Any = model.hf_text_config
    kinds = layers_by_kind(text_config)
    overrides = model.model_arch_config.per_layer_overrides or ()
    unusual = unusual_attention(text_config)
    if any(SIZES & set(layer) for layer in overrides) and VARIED not in unusual:
        unusual.append(VARIED)
    has_chunks = "chunked_attention" in kinds or bool(
        getattr(text_config, "attention_chunk_size", None)
    )
    slides = not model.disable_sliding_window and slides_within(text_config, model.max_model_len)
    run_without = f"run {model.architecture} without --kv-compression"
    problems = [
        (model.use_mla, f"multi-head latent attention (MLA); {run_without}"),
        (
            model.is_attention_free,
            f"models without attention, whose layers hold no KV pairs; {run_without}",
        ),
        (
            slides and not compressed_layers(vllm_config),
            f"models whose layers all have a sliding window{_within_window(text_config)} "
            f"{run_without}",
        ),
        (has_chunks, f"chunked local attention; {run_without}"),
        (
            bool(model.rswa_window),
            f"attention whose window begins behind the prompt; {run_without}",
        ),
        *((True, f"{what}; {run_without}") for what in unusual),
        *((True, f"layers of kind {kind}; {run_without}") for kind in unknown_kinds(text_config)),
        (
            compressed_layers(vllm_config) == [],
            f"models without a layer that attends to the whole context; {run_without}",
        ),
        (
            model.is_hybrid and not kinds,
            f"layers with a state where the configuration has no layer_types to tell them by; "
            f"{run_without}",
        ),
        (model.is_encoder_decoder, f"encoder-decoder models; {run_without}"),
        (model.runner_type != "generate", f"--runner {model.runner_type}; it serves generation"),
    ]
    return [text for present, text in problems if present]


def _plan_problems(plan: CachePlan) -> list[str]:
    """What is known once vLLM's planner has grouped layers like those of the model."""
    if len(plan.full_groups) <= 1:
        return []
    num_full = sum(len(group.layer_names) for group in plan.full_groups)
    left_alone = sum(layers.num_layers for layers in plan.others)
    return [
        f"{num_full} layers of full attention beside {left_alone} others, which vLLM splits into "
        f"{len(plan.full_groups)} KV cache groups of full attention; run "
        f"{plan.vllm_config.model_config.architecture} without --kv-compression"
    ]


def is_mixed(vllm_config: VllmConfig) -> bool:
    """Whether some layers are compressed and others are left alone."""
    layers = compressed_layers(vllm_config)
    kinds = layers_by_kind(vllm_config.model_config.hf_text_config)
    return layers is not None and 0 < len(layers) < sum(kinds.values())


def _has_states(vllm_config: VllmConfig) -> bool:
    """Whether some layers hold a state of what they read: linear attention and its like."""
    kinds = layers_by_kind(vllm_config.model_config.hf_text_config)
    return any(kind in kinds for kind in STATE_KINDS)


def _within_window(text_config: Any) -> str:
    window = sliding_window(text_config)
    return f"; set --max-model-len to {window} or less, or" if window else ";"


def _engine_problems(vllm_config: VllmConfig) -> list[str]:
    parallel = vllm_config.parallel_config
    cache = vllm_config.cache_config
    problems = parallel_problems(vllm_config, is_mixed(vllm_config))
    problems += [
        *connector_problems(vllm_config, is_mixed(vllm_config)),
        *speculation_problems(vllm_config, is_mixed(vllm_config)),
        (
            unserved_device() is not None,
            f"{unserved_device()}; it runs on NVIDIA GPUs and on CPUs",
        ),
        (
            parallel.worker_cls not in STOCK_WORKERS,
            f"--worker-cls {parallel.worker_cls}; remove the flag",
        ),
        (
            is_mixed(vllm_config)
            and bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
            "layers of other kinds beside full attention in one KV cache group; remove "
            "--disable-hybrid-kv-cache-manager",
        ),
        (
            vllm_config.scheduler_config.scheduler_cls is not None,
            f"--scheduler-cls {vllm_config.scheduler_config.scheduler_cls}; remove the flag",
        ),
    ]
    of_platform = _cpu_problems if running_platform().name == "cpu" else _gpu_problems
    problems += of_platform(vllm_config)
    problems += [  # last, because vLLM itself adds such layers to some caches named above
        (
            bool(cache.kv_cache_dtype_skip_layers),
            "layers of different dtypes; remove --kv-cache-dtype-skip-layers",
        ),
    ]
    return [text for present, text in problems if present]


def _cpu_problems(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    return [
        _block_size_problem(vllm_config),
        _cache_dtype_problem(vllm_config, (), " on the CPU"),
    ]


def _gpu_problems(vllm_config: VllmConfig) -> list[tuple[bool, str]]:
    model, backend = vllm_config.model_config, vllm_config.attention_config.backend
    backends = running_platform().attention_backends
    reads_fp8 = current_platform.has_device_capability(FP8_CAPABILITY)
    before = f" on GPUs before compute capability {FP8_CAPABILITY / 10}"
    return [
        _block_size_problem(vllm_config),
        (
            backend is not None and backend.name not in backends,
            f"--attention-backend {getattr(backend, 'name', None)}; use one of "
            f"{', '.join(backends)} or none",
        ),
        _cache_dtype_problem(vllm_config, FP8_CACHES if reads_fp8 else (), before),
        (
            bool(vllm_config.attention_config.backend_per_kind),
            "attention backends by kind of layer; remove backend_per_kind",
        ),
        (vllm_config.parallel_config.use_ubatching, "--enable-dbo; remove the flag"),
        (
            has_cascade_attention() and not model.disable_cascade_attn,
            "cascade attention; remove --no-disable-cascade-attn",
        ),
        (envs.VLLM_BATCH_INVARIANT, "VLLM_BATCH_INVARIANT; unset it"),
        (model.is_mm_prefix_lm, "models whose prompts attend in both directions"),
    ]


def _block_size_problem(vllm_config: VllmConfig) -> tuple[bool, str]:
    platform, size = running_platform(), vllm_config.cache_config.block_size
    return (
        not platform.takes_block_size(size),
        f"--block-size {size} {platform.where}; use {platform.block_sizes}",
    )


def _cache_dtype_problem(
    vllm_config: VllmConfig, also: tuple[str, ...], where: str
) -> tuple[bool, str]:
    """A KV cache must hold numbers of the model's dtype, or of a format that is read here.

    Args:
        vllm_config: of the engine.
        also: names of vLLM's for the other formats that are read here.
        where: a device that does not read ``fp8``.
    """
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    asked, running = vllm_config.cache_config.cache_dtype, running_cache_dtype(vllm_config)
    cause = running if asked == running else f"{running}, which the checkpoint asks for,"
    fitting = dtype
    if dtype == "float32":  # vLLM has no name for such a cache
        fitting = "auto" if asked == running else "bfloat16 and --dtype to bfloat16"
    return (
        running not in ("auto", dtype, *also),
        f"--kv-cache-dtype {cause}{where if running in FP8_CACHES else ''} for a model that runs "
        f"in {dtype}; set it to {' or '.join([fitting, *also[:1]])}",
    )


def check_attention_kernel(config: KVzipConfig, cache_dtype: str) -> None:
    """Refuse a choice where there is none.

    Args:
        config: of compression.
        cache_dtype: vLLM's name of it.

    Raises:
        ConfigError: naming the setting.
    """
    kernel = config.attention_kernel
    if kernel != "auto" and not running_platform().has_kernel_choice:
        raise ConfigError(f"attention_kernel {kernel} is a choice for GPUs; remove it on the CPU.")
    if kernel == "vllm" and cache_dtype in FP8_CACHES:
        raise ConfigError(
            f"attention_kernel vllm does not work with --kv-cache-dtype {cache_dtype} yet; set it "
            f"to auto or triton."
        )
    if kernel == "vllm" and config.mode != "evict":
        raise ConfigError(
            f"attention_kernel vllm cannot read the quantized pages of mode {config.mode}; set it "
            f"to auto or triton."
        )


def check_page_code(quantization: Quantization | None) -> None:
    """Refuse formats whose pages our kernel cannot read on a GPU.

    Args:
        quantization: how quantized pages are written; None where there are none.

    Raises:
        ConfigError: naming the format.
    """
    if quantization is None or running_platform().name == "cpu":
        return
    used = quantization.layout.key_format, quantization.layout.value_format
    for setting, chosen in zip(("key_format", "value_format"), used, strict=True):
        if chosen.page_code is None:
            raise ConfigError(
                f"{setting} {chosen.name} works on CPUs only, as it has no Triton code; choose "
                f"another format on GPUs."
            )
    books = [chosen.code_book for chosen in used if chosen.code_book is not None]
    if len(books) == 2 and not books[0].equal(books[1]):
        raise ConfigError(
            f"key_format {used[0].name} and value_format {used[1].name} look their codes up in "
            f"different tables, which does not work on GPUs; choose one format for both."
        )
