"""Every name of vLLM's that the bridge uses, and where it is found: only here vLLM is imported.

``from vllm_kvzip.vllm_bridge.symbols import Attention`` imports what the table below says, when it
is asked for. So a process loads only what it needs, a name that moves in a new vLLM is one line
here, and :func:`check_symbols` tells at start-up whether all of them are there, before a worker
trips over one.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

_ROTARY = "vllm.model_executor.layers.rotary_embedding"

COMMON: dict[str, str] = {
    "async_tensor_h2d": "vllm.utils.torch_utils",
    "AsyncEngineArgs": "vllm.engine.arg_utils",
    "AsyncModelRunnerOutput": "vllm.v1.outputs",
    "AsyncScheduler": "vllm.v1.core.sched.async_scheduler",
    "Attention": "vllm.model_executor.layers.attention",
    "AttentionBackendEnum": "vllm.v1.attention.backends.registry",
    "AttentionImpl": "vllm.v1.attention.backend",
    "AttentionLayerBase": "vllm.model_executor.layers.attention_layer_base",
    "AttentionMetadataBuilder": "vllm.v1.attention.backend",
    "BlockHash": "vllm.v1.core.kv_cache_utils",
    "cached_get_attn_backend": "vllm.v1.attention.selector:_cached_get_attn_backend",
    "cached_tokenizer_from_config": "vllm.tokenizers",
    "cdiv": "vllm.utils.math_utils",
    "CompilationMode": "vllm.config",
    "current_platform": "vllm.platforms",
    "EngineArgs": "vllm.engine.arg_utils",
    "EngineCore": "vllm.v1.engine.core",
    "EngineCoreOutput": "vllm.v1.engine",
    "EngineCoreOutputs": "vllm.v1.engine",
    "envs": "vllm",
    "FullAttentionManager": "vllm.v1.core.single_type_kv_cache_manager",
    "FullAttentionSpec": "vllm.v1.kv_cache_interface",
    "get_layers_from_vllm_config": "vllm.config",
    "get_pp_group": "vllm.distributed",
    "get_tensor_model_parallel_rank": "vllm.distributed",
    "get_tensor_model_parallel_world_size": "vllm.distributed",
    "get_tp_group": "vllm.distributed",
    "groups_of_equal_pages": (
        "vllm.v1.core.kv_cache_utils:_get_kv_cache_groups_uniform_page_size "
        "vllm.v1.core.kv_cache_planning:_get_kv_cache_groups_uniform_page_size"
    ),
    "init_logger": "vllm.logger",
    "kv_cache_dtype_str_to_dtype": "vllm.utils.torch_utils",
    "KVCacheBlockCopy": "vllm.v1.core.kv_cache_utils",
    "KVCacheConfig": "vllm.v1.kv_cache_interface",
    "KVCacheGroupSpec": "vllm.v1.kv_cache_interface",
    "KVCacheLayout": "vllm.v1.kv_cache_layout",
    "KVCacheSpec": "vllm.v1.kv_cache_interface",
    "KVCacheSpecRegistry": "vllm.v1.kv_cache_spec_registry",
    "KVConnectorFactory": "vllm.distributed.kv_transfer.kv_connector.factory",
    "MambaManager": "vllm.v1.core.single_type_kv_cache_manager",
    "MambaSpec": "vllm.v1.kv_cache_interface",
    "make_block_hash_with_group_id": "vllm.v1.core.kv_cache_utils",
    "ModelRegistry": "vllm.model_executor.models",
    "PauseState": "vllm.v1.core.sched.interface",
    "Phi3LongRoPEScaledRotaryEmbedding": f"{_ROTARY}.phi3_long_rope_scaled_rope",
    "register_backend": "vllm.v1.attention.backends.registry",
    "replace_as": "vllm.v1.kv_cache_interface",
    "Request": "vllm.v1.request",
    "RequestStatus": "vllm.v1.request",
    "RotaryEmbeddingBase": f"{_ROTARY}.base",
    "SamplingParams": "vllm",
    "Scheduler": "vllm.v1.core.sched.scheduler",
    "set_forward_context": "vllm.forward_context",
    "SlidingWindowSpec": "vllm.v1.kv_cache_interface",
    "tensor_model_parallel_all_gather": "vllm.distributed",
    "tensor_model_parallel_all_reduce": "vllm.distributed",
    "with_gpu_sync_check": "vllm.utils.gpu_sync_debug",
    "WorkerBase": "vllm.v1.worker.worker_base",
    "vllm_version": "vllm:__version__",
}
"""Every process of an engine, or the one that makes its configuration."""

SERVER: dict[str, str] = {
    "AsyncLLM": "vllm.v1.engine.async_llm",
    "ChatCompletionRequest": "vllm.entrypoints.openai.chat_completion.protocol",
    "CompletionRequest": "vllm.entrypoints.openai.completion.protocol",
    "EngineClient": "vllm.engine.protocol",
    "InputProcessor": "vllm.v1.engine.input_processor",
    "length_from_prompt_token_ids_or_embeds": "vllm.utils",
    "ModelConfig": "vllm.config",
    "OpenAIServingResponses": "vllm.entrypoints.openai.responses.serving",
    "random_uuid": "vllm.utils",
    "ServingGenerativeScoring": "vllm.entrypoints.generate.generative_scoring.serving",
    "ServingStructuredDecisions": "vllm.entrypoints.generate.structured_decisions.serving",
    "TokenizeChatRequest": "vllm.entrypoints.serve.tokenize.protocol",
    "TokenizeCompletionRequest": "vllm.entrypoints.serve.tokenize.protocol",
    "TokenizeParams": "vllm.renderers",
    "TranscriptionRequest": "vllm.entrypoints.speech_to_text.transcription.protocol",
    "TranslationRequest": "vllm.entrypoints.speech_to_text.translation.protocol",
    "validate_cache_salt": "vllm.entrypoints.generate.base.protocol",
    "validate_json_request": "vllm.entrypoints.serve.utils.api_utils",
    "VLLMClientError": "vllm.exceptions",
    "VLLMNotFoundError": "vllm.exceptions",
    "VLLMServerError": "vllm.exceptions",
    "VLLMValidationError": "vllm.exceptions",
    "with_cancellation": "vllm.entrypoints.serve.utils.api_utils",
}
"""The API server."""

CPU: dict[str, str] = {
    "CPUAttentionBackend": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionBackendImpl": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadata": "vllm.v1.attention.backends.cpu_attn",
    "CPUAttentionMetadataBuilder": "vllm.v1.attention.backends.cpu_attn",
    "CPUWorker": "vllm.v1.worker.cpu_worker",
    "custom_ops": "vllm:_custom_ops",
}
"""Workers on CPUs."""

GPU: dict[str, str] = {
    "AttentionCGSupport": "vllm.v1.attention.backend",
    "CommonAttentionMetadata": "vllm.v1.attention.backend",
    "FlashAttentionBackend": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionImpl": "vllm.v1.attention.backends.flash_attn",
    "FlashAttentionMetadataBuilder": "vllm.v1.attention.backends.flash_attn",
    "GPUWorker": "vllm.v1.worker.gpu_worker:Worker",
    "is_flash_attn_varlen_func_available": "vllm.v1.attention.backends.fa_utils",
    "set_current_vllm_config": "vllm.config",
    "TritonAttentionBackend": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionImpl": "vllm.v1.attention.backends.triton_attn",
    "TritonAttentionMetadataBuilder": "vllm.v1.attention.backends.triton_attn",
}
"""Workers on GPUs."""

TOOLS: dict[str, str] = {
    "FlexibleArgumentParser": "vllm.utils.argparse_utils",
    "LLM": "vllm",
    "LogitsProcessor": "vllm.v1.sample.logits_processor.interface",
    "make_arg_parser": "vllm.entrypoints.launchers.cli_args vllm.entrypoints.common.cli_args",
    "process_dict_updates": "vllm.v1.sample.logits_processor.builtin",
    "UsageContext": "vllm.usage.usage_lib",
}
"""The command ``vllm-kvzip``: no engine needs them, so none looks for them when it starts."""

TYPES: dict[str, str] = {
    "BatchUpdate": "vllm.v1.sample.logits_processor.interface",
    "BlockHashWithGroupId": "vllm.v1.core.kv_cache_utils",
    "BlockPool": "vllm.v1.core.block_pool",
    "CachedRequestData": "vllm.v1.core.sched.output",
    "EngineCoreRequest": "vllm.v1.engine",
    "GPUModelRunner": "vllm.v1.worker.gpu_model_runner",
    "GPUModelRunnerV2": "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    "InputBatch": "vllm.v1.worker.gpu.input_batch",
    "KVCacheBlock": "vllm.v1.core.kv_cache_utils",
    "KVCacheBlocks": "vllm.v1.core.kv_cache_manager",
    "KVCacheManager": "vllm.v1.core.kv_cache_manager",
    "KVConnectorBase": "vllm.distributed.kv_transfer.kv_connector.v1:KVConnectorBase_V1",
    "KVTransferConfig": "vllm.config",
    "ModelRunnerOutput": "vllm.v1.outputs",
    "NewRequestData": "vllm.v1.core.sched.output",
    "SchedulerConfig": "vllm.config",
    "SchedulerOutput": "vllm.v1.core.sched.output",
    "SingleTypeKVCacheManager": "vllm.v1.core.single_type_kv_cache_manager",
    "VllmConfig": "vllm.config",
}
"""Annotations only: nothing imports them when it runs."""

PLACES = {**COMMON, **SERVER, **CPU, **GPU, **TOOLS, **TYPES}
"""Name -> ``module``, or ``module:name`` where vLLM's own name is another one.

Places of several vLLM versions are separated by a space; the first one that exists is taken.
"""

SINCE: dict[str, tuple[int, int]] = {"ServingStructuredDecisions": (0, 32)}
"""Names that came with a version of vLLM. Older ones have nothing of the kind: there it is None."""


def __getattr__(name: str) -> Any:
    """A name of vLLM's.

    Raises:
        AttributeError: if it is not in the table.
        ImportError: if the running vLLM has it in no place of the table.
    """
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    failure: Exception | None = None
    for place in PLACES[name].split():
        module, _, attribute = place.partition(":")
        try:
            return _find(module, attribute or name)
        except (ImportError, AttributeError) as error:
            failure = failure or error
    if name in SINCE and is_before(SINCE[name]):
        return None
    raise ImportError(f"cannot import name {name!r} from vLLM: {failure}") from failure


def check_symbols(*groups: dict[str, str]) -> None:
    """Import all names of some groups.

    Raises:
        ImportError: names the first one that is missing.
    """
    for group in groups:
        for name in group:
            __getattr__(name)


def is_before(version: tuple[int, int]) -> bool:
    """Whether the running vLLM is older than a version; one that tells no number is not."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", __getattr__("vllm_version"))[:2])
    return bool(numbers) and numbers < version


def _find(module: str, attribute: str) -> Any:
    found = import_module(module)
    if hasattr(found, attribute):
        return getattr(found, attribute)
    return import_module(f"{module}.{attribute}")  # a module of a package
