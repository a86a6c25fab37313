"""What tells whether a head profile belongs to an engine's model, and who has which of its rows."""

from __future__ import annotations

from copy import copy
from typing import TYPE_CHECKING

from vllm_kvzip.head_profiles.head_profile import ModelFingerprint
from vllm_kvzip.model.attention_kinds import full_attention_layers

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig


def compressed_layers(vllm_config: VllmConfig) -> list[int] | None:
    """Which layers are compressed: those that attend to the whole of the longest request.

    Returns:
        their indices; None when the model has one kind of layer only.
    """
    model = vllm_config.model_config
    longest = 0 if model.disable_sliding_window else model.max_model_len
    return full_attention_layers(model.hf_text_config, longest)


def rows_of_stages(vllm_config: VllmConfig) -> list[slice]:
    """Rows of a head profile, by pipeline stage: one for each of its layers that is compressed."""
    model, full = vllm_config.model_config, compressed_layers(vllm_config)
    rows, begin = [], 0
    for stage in range(vllm_config.parallel_config.pipeline_parallel_size):
        parallel = copy(vllm_config.parallel_config)  # vLLM asks it which stage is meant
        parallel.rank = stage * parallel.tensor_parallel_size
        if full:
            first, end = model.get_layers_start_end_indices(parallel)
            count = sum(first <= layer < end for layer in full)
        else:
            count = model.get_num_layers_by_block_type(parallel)
        rows.append(slice(begin, begin + count))
        begin += count
    return rows


def model_fingerprint(vllm_config: VllmConfig) -> ModelFingerprint:
    """What a head profile must match: the whole model, on however many ranks it runs.

    A profile has a row for every layer that attends to the whole context; others do not count.
    """
    model = vllm_config.model_config
    architecture = model.architecture
    if model.using_transformers_backend():  # the profile names the model, not who runs it
        architecture = next(iter(model.architectures), architecture)
    return ModelFingerprint(
        architecture=architecture,
        num_layers=rows_of_stages(vllm_config)[-1].stop,
        num_query_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        name=str(model.model).rstrip("/").split("/")[-1],
    )
