"""What tells whether a head profile belongs to an engine's model."""

from __future__ import annotations

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


def model_fingerprint(vllm_config: VllmConfig) -> ModelFingerprint:
    """What a head profile must match: the whole model, on however many ranks it runs.

    A profile has a row for every layer that attends to the whole context; others do not count.
    """
    model = vllm_config.model_config
    architecture = model.architecture
    if model.using_transformers_backend():  # the profile names the model, not who runs it
        architecture = next(iter(model.architectures), architecture)
    num_layers = model.get_num_layers_by_block_type(vllm_config.parallel_config)
    if full := compressed_layers(vllm_config):
        num_layers = len(full)
    return ModelFingerprint(
        architecture=architecture,
        num_layers=num_layers,
        num_query_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        name=str(model.model).rstrip("/").split("/")[-1],
    )
