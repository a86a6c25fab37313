"""What tells whether a head profile belongs to an engine's model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_kvzip.head_profiles.head_profile import ModelFingerprint

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig


def model_fingerprint(vllm_config: VllmConfig) -> ModelFingerprint:
    """What a head profile must match: the whole model, on however many ranks it runs.

    Layers without attention do not count: a profile has a row for every layer that has some.
    """
    model = vllm_config.model_config
    architecture = model.architecture
    if model.using_transformers_backend():  # the profile names the model, not who runs it
        architecture = next(iter(model.architectures), architecture)
    return ModelFingerprint(
        architecture=architecture,
        num_layers=model.get_num_layers_by_block_type(vllm_config.parallel_config),
        num_query_heads=model.model_arch_config.total_num_attention_heads,
        num_kv_heads=model.get_total_num_kv_heads(),
        head_dim=model.get_head_size(),
        name=str(model.model).rstrip("/").split("/")[-1],
    )
