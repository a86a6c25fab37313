"""The KV cache that vLLM will make for a model, known from its configuration, before any weight is.

vLLM's own planner groups layers that are made up from the configuration, and its platform says how
large blocks get where states of fixed size must fit into them.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm_kvzip.model.attention_kinds import (
    FULL_KINDS,
    SLIDING_KIND,
    STATE_KINDS,
    layers_by_kind,
    sliding_window,
)
from vllm_kvzip.model.cache_shares import AlikeLayers
from vllm_kvzip.vllm_bridge.compressed_group import CompressedGroup, block_bytes
from vllm_kvzip.vllm_bridge.drafts import num_draft_layers
from vllm_kvzip.vllm_bridge.fingerprint import (
    compressed_layers,
    model_fingerprint,
    rows_of_stages,
)
from vllm_kvzip.vllm_bridge.fp8_cache import running_cache_dtype
from vllm_kvzip.vllm_bridge.platforms import running_platform
from vllm_kvzip.vllm_bridge.symbols import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
    current_platform,
    groups_of_equal_pages,
    kv_cache_dtype_str_to_dtype,
)

if TYPE_CHECKING:
    from vllm_kvzip.vllm_bridge.symbols import KVCacheSpec, VllmConfig


@dataclass(frozen=True)
class CachePlan:
    """What vLLM will make of the layers of a model.

    Attributes:
        groups: vLLM's KV cache groups.
        vllm_config: of the engine, with the block size that the workers will have.
    """

    groups: tuple[KVCacheGroupSpec, ...]
    vllm_config: VllmConfig

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return int(self.vllm_config.cache_config.block_size)

    @functools.cached_property
    def full_groups(self) -> list[KVCacheGroupSpec]:
        """The groups of layers that attend to the whole context; more than one is refused."""
        return [g for g in self.groups if isinstance(g.kv_cache_spec, FullAttentionSpec)]

    @functools.cached_property
    def others(self) -> list[AlikeLayers]:
        """The layers of each group that is left alone."""
        found = []
        for group in self.groups:
            spec, layers = group.kv_cache_spec, AlikeLayers(len(group.layer_names))
            if isinstance(spec, SlidingWindowSpec):
                found.append(replace(layers, window=spec.sliding_window))
            elif isinstance(spec, MambaSpec):
                most = spec.max_memory_usage_bytes(self.vllm_config)
                found.append(replace(layers, state_blocks=-(-most // spec.page_size_bytes)))
        return found

    @property
    def block_bytes(self) -> int:
        """Bytes of one block on one rank, of the pipeline stage that has the most layers."""
        rows = rows_of_stages(self.vllm_config)
        most = max(of_stage.stop - of_stage.start for of_stage in rows)
        return block_bytes(self._of_blocks(1)) * most // rows[-1].stop

    def pool_blocks(self, num_blocks: int) -> int:
        """Blocks that the compressed group can have, of a pool of ``num_blocks``."""
        config = self._of_blocks(num_blocks)
        group = CompressedGroup.find(config, FullAttentionSpec)
        return group.share_of_pool(config, self.vllm_config)

    def blocks_of_others(self, num_tokens: int) -> int:
        """Blocks that one request holds in the groups that are left alone, as its answer begins."""
        return sum(layers.blocks(num_tokens, self.block_size) for layers in self.others)

    def _of_blocks(self, num_blocks: int) -> KVCacheConfig:
        return KVCacheConfig(num_blocks, kv_cache_tensors=[], kv_cache_groups=list(self.groups))


def plan_cache(vllm_config: VllmConfig) -> CachePlan:
    """What vLLM will make of the layers of a model that passed the checks of its configuration.

    Args:
        vllm_config: of the engine, before the workers get it; not changed.
    """
    kinds = layers_by_kind(vllm_config.model_config.hf_text_config)
    states = {kind: number for kind, number in kinds.items() if kind in STATE_KINDS}
    vllm_config = _with_block_for_states(vllm_config) if states else vllm_config
    specs = _layer_specs(vllm_config, kinds, sum(states.values()))
    if len(set(specs.values())) == 1:
        groups = [KVCacheGroupSpec(list(specs), next(iter(specs.values())))]
    else:
        groups = groups_of_equal_pages(specs)
    return CachePlan(tuple(groups), vllm_config)


def _layer_specs(
    vllm_config: VllmConfig, kinds: dict[str, int], num_states: int
) -> dict[str, KVCacheSpec]:
    """vLLM's specs of layers like those of the model, by made-up names."""
    model = vllm_config.model_config
    shape: dict[str, Any] = {
        "block_size": vllm_config.cache_config.block_size,
        "num_kv_heads": model.get_num_kv_heads(vllm_config.parallel_config),
        "head_size": model.get_head_size(),
        "dtype": kv_cache_dtype_str_to_dtype(running_cache_dtype(vllm_config), model),
    }
    num_full = model_fingerprint(vllm_config).num_layers
    num_sliding = 0
    if compressed_layers(vllm_config) is not None:
        attending = sum(kinds.get(kind, 0) for kind in (*FULL_KINDS, SLIDING_KIND))
        num_sliding = attending - num_full
    specs: dict[str, KVCacheSpec] = {}
    full = FullAttentionSpec(**shape)
    specs |= {f"full.{index}": full for index in range(num_full)}
    specs |= {f"draft.{index}": full for index in range(num_draft_layers(vllm_config))}
    if num_sliding:
        window = sliding_window(model.hf_text_config)
        narrow = SlidingWindowSpec(**shape, sliding_window=window)
        specs |= {f"window.{index}": narrow for index in range(num_sliding)}
    if num_states:
        state = _state_spec(vllm_config)
        specs |= {f"state.{index}": state for index in range(num_states)}
    return specs


def _state_spec(vllm_config: VllmConfig) -> MambaSpec:
    """vLLM's spec of a layer that holds a state, where blocks are large enough for it."""
    from vllm_kvzip.vllm_bridge.symbols import ModelRegistry

    model, cache = vllm_config.model_config, vllm_config.cache_config
    model_class, _ = ModelRegistry.resolve_model_cls(model.architecture, model_config=model)
    return MambaSpec(
        shapes=tuple(model_class.get_mamba_state_shape_from_config(vllm_config)),
        dtypes=tuple(model_class.get_mamba_state_dtype_from_config(vllm_config)),
        block_size=cache.mamba_block_size or model.max_model_len,
        page_size_padded=cache.mamba_page_size_padded,
        mamba_cache_mode=cache.mamba_cache_mode,
        num_speculative_blocks=vllm_config.num_speculative_tokens,
    )


def _with_block_for_states(vllm_config: VllmConfig) -> VllmConfig:
    """A copy whose blocks are as large as the workers will make them.

    vLLM's platform does it in each worker, once the layers are there. It asks them for their
    attention backend only, which is known.
    """
    changed = copy.copy(vllm_config)
    changed.cache_config = copy.copy(vllm_config.cache_config)
    current_platform._align_hybrid_block_size(changed, _attention_backend(vllm_config))
    return changed


def _attention_backend(vllm_config: VllmConfig) -> Any:
    """vLLM's backend of the layers that attend to the whole context."""
    if running_platform().name == "cpu":
        from vllm_kvzip.vllm_bridge.symbols import CPUAttentionBackend

        return CPUAttentionBackend
    from vllm_kvzip.vllm_bridge.start.gpu_backend import default_gpu_backend

    backend = vllm_config.attention_config.backend or default_gpu_backend(vllm_config)
    return backend.get_class()
