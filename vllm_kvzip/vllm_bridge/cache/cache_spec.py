"""The KV cache spec of compressed layers.

Importing this module registers the spec and its block manager with vLLM. The spec is pickled from
the workers to the engine core, so the import happens exactly where compression is on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.reuse_rule import ReuseRule
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_draft_layers, check_layers
from vllm_kvzip.vllm_bridge.drafts import num_guessed_tokens
from vllm_kvzip.vllm_bridge.scheduler.block_manager import HeadPageManager
from vllm_kvzip.vllm_bridge.symbols import (
    FullAttentionSpec,
    KVCacheSpec,
    KVCacheSpecRegistry,
    SlidingWindowSpec,
    replace_as,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from vllm_kvzip.planning.reconstruction import RepeatRule
    from vllm_kvzip.vllm_bridge.settings import Settings
    from vllm_kvzip.vllm_bridge.symbols import VllmConfig

# vLLM's merge makes a spec of the fields it knows; our fields are set afterwards.
_NO_RULE = PrefixRule(1.0, min_prompt_tokens=0, sink_tokens=0, recent_tokens=0, block_size=1)


@dataclass(frozen=True, kw_only=True)
class HeadPageSpec(FullAttentionSpec):
    """Full attention whose prompt prefix is compressed into head pages after prefill.

    Attributes:
        rule: what is compressed, into how many blocks. It also sizes the extra blocks of the
            crossing step: a request that asks for a higher keep ratio than the server's may need
            up to twice its prompt's blocks.
        num_layers: layers that the spec is for: 1, or the layers of the KV cache group once vLLM
            has merged their specs, those of all pipeline stages.
        num_ranks: tensor-parallel workers, each of which holds a part of every block.
        metrics_directory: where the engine's metric files go.
        reuse: which compressed prefixes later requests start from.
        repeat: how the model repeats contexts; None where the scorer does not want it.
    """

    rule: PrefixRule = _NO_RULE
    num_layers: int = 1
    num_ranks: int = 1
    metrics_directory: str | None = None
    reuse: ReuseRule = field(default_factory=ReuseRule)
    repeat: RepeatRule | None = None

    @classmethod
    def from_full_attention(
        cls,
        spec: FullAttentionSpec,
        settings: Settings,
        vllm_config: VllmConfig,
        sharing: tuple[int, int] = (1, 0),
    ) -> HeadPageSpec:
        """The same layer cache as ``spec``, with the compression rule of ``settings``.

        Args:
            spec: vLLM's.
            settings: of this engine.
            vllm_config: of the engine.
            sharing: layers that have a part of each block, and those of them that keep every KV
                pair.
        """
        config = settings.config
        rule = settings.rule(spec.block_size, spec.head_size, spec.dtype.itemsize)
        return replace_as(
            spec,
            cls,
            rule=replace(
                rule,
                num_layers=sharing[0],
                num_dense_layers=sharing[1],
                num_guessed_tokens=num_guessed_tokens(vllm_config),
            ),
            num_ranks=vllm_config.parallel_config.tensor_parallel_size,
            metrics_directory=settings.metrics_directory,
            repeat=settings.repeat_rule(vllm_config),
            reuse=ReuseRule(
                fingerprint=settings.fingerprint(spec.block_size),
                prefer_raw=config.prefix_reuse == "raw",
                ttl_seconds=config.reuse_ttl_seconds,
                observation_tokens=settings.prompt_observation_tokens,
                round_observation_tokens=settings.observation_tokens,
                keeps_tokens=config.contexts_dir is not None,
            ),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of the group and all ranks."""
        return int(self.page_size_bytes) * self.num_layers * self.num_ranks

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        """One spec for a KV cache group, of the specs of its layers.

        vLLM's merge keeps only the fields that it knows.
        """
        merged = super().merge(specs)
        first = specs[0]
        return replace(
            merged,
            rule=first.rule,
            num_layers=len(specs),
            num_ranks=first.num_ranks,
            metrics_directory=first.metrics_directory,
            reuse=first.reuse,
            repeat=first.repeat,
        )

    def max_num_blocks_per_req(self, vllm_config: Any, max_len: int) -> int:
        """Width of a block table row in blocks: the crossing step holds prompt and reserve."""
        width: int = super().max_num_blocks_per_req(vllm_config, max_len)
        return 2 * width

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes that one layer needs for the longest request in its crossing step."""
        num_blocks = self.rule.startup_blocks(vllm_config.model_config.max_model_len)
        return int(num_blocks * self.page_size_bytes)


def register_spec() -> None:
    """Tell vLLM which manager serves :class:`HeadPageSpec`; harmless when repeated.

    vLLM registers its own specs lazily, and only while its registry is empty. So it must register
    them before ours makes the registry look complete.
    """
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(
        HeadPageSpec, HeadPageManager, uniform_type_base_spec=FullAttentionSpec
    )


def as_head_page_specs(
    specs: dict[str, KVCacheSpec],
    layers: Mapping[str, Any],
    settings: Settings,
    vllm_config: VllmConfig,
    drafts: Collection[str] = (),
) -> dict[str, KVCacheSpec]:
    """The spec of every layer that attends to the whole context as :class:`HeadPageSpec`.

    Args:
        specs: vLLM's spec by layer name.
        layers: vLLM's attention layers by name.
        settings: resolved settings of this engine.
        vllm_config: of the engine.
        drafts: names of the layers of a draft model, which keep every KV pair.

    Raises:
        UnsupportedError: see :func:`~vllm_kvzip.vllm_bridge.cache.layer_checks.check_layers`.
    """
    found = {name: _without_window(spec, vllm_config) for name, spec in specs.items()}
    check_layers(found, layers, vllm_config)
    check_draft_layers(found, drafts)
    num_full = sum(isinstance(spec, FullAttentionSpec) for spec in found.values())
    sharing = (num_full, len(drafts))
    return {
        name: HeadPageSpec.from_full_attention(spec, settings, vllm_config, sharing)
        if isinstance(spec, FullAttentionSpec)
        else spec
        for name, spec in found.items()
    }


def _without_window(spec: KVCacheSpec, vllm_config: VllmConfig) -> KVCacheSpec:
    """The spec of a layer whose window holds the longest request, as full attention."""
    longest = vllm_config.model_config.max_model_len
    if type(spec) is not SlidingWindowSpec or spec.sliding_window < longest:
        return spec
    return FullAttentionSpec(
        block_size=vllm_config.cache_config.block_size,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        head_size_v=spec.head_size_v,
        dtype=spec.dtype,
        kv_quant_mode=spec.kv_quant_mode,
    )


register_spec()
