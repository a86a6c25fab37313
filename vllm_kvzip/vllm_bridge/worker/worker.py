"""What compression adds to vLLM's workers, whatever they run on.

``parallel_config.worker_cls`` is vLLM's own way to name a worker, so nothing is patched in the
worker process: a process without compression never imports this file. Beside it lie the CPU's
worker and the GPU's, which say what differs.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.model.key_transform import num_first
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.scoring import ScorerSettings, create_scorer
from vllm_kvzip.vllm_bridge.attention.attention_timer import AttentionTimer
from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec, as_head_page_specs
from vllm_kvzip.vllm_bridge.cache.cache_view import map_head_pages
from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_capped_logits
from vllm_kvzip.vllm_bridge.fp8_cache import read_scales
from vllm_kvzip.vllm_bridge.passes.model_rotary import find_rotary, num_positions
from vllm_kvzip.vllm_bridge.passes.scoring_pass import ReconstructionPass, RepeatPrompt
from vllm_kvzip.vllm_bridge.settings import KEY, Settings
from vllm_kvzip.vllm_bridge.stats_export import WorkerRecorder
from vllm_kvzip.vllm_bridge.symbols import (
    Attention,
    AttentionLayerBase,
    WorkerBase,
    cached_get_attn_backend,
    get_layers_from_vllm_config,
    get_tensor_model_parallel_rank,
    init_logger,
    register_backend,
    with_gpu_sync_check,
)
from vllm_kvzip.vllm_bridge.tensor_parallel import first_kv_head
from vllm_kvzip.vllm_bridge.worker.head_page_runtime import HeadPageRuntime
from vllm_kvzip.vllm_bridge.worker.repeats import Repeats
from vllm_kvzip.vllm_bridge.worker.requests import RequestTracker
from vllm_kvzip.vllm_bridge.worker.runners import adapt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.storage.stored_scales import StoredScales
    from vllm_kvzip.vllm_bridge.attention.batches import Batcher
    from vllm_kvzip.vllm_bridge.symbols import (
        AttentionBackendEnum,
        KVCacheConfig,
        KVCacheSpec,
        SchedulerOutput,
    )

logger = init_logger("vllm." + __name__)

SCORER_WITHOUT_ROTARY = "keydiff"  # where the default scorer finds no rotary embedding


class HeadPageWorker(WorkerBase):
    """In front of one of vLLM's workers; compresses prompts between steps.

    Attributes:
        backends: our attention backends, by the one of vLLM whose place they take.
        builder_class: their metadata builders.
        clock: measures the work of this worker's device.
    """

    backends: ClassVar[Mapping[AttentionBackendEnum, type]]
    builder_class: ClassVar[type]
    clock: ClassVar[Clock]

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self._kvzip_settings = Settings.from_vllm_config(vllm_config)
        self._kvzip: HeadPageRuntime | None = None
        self._kvzip_serves = False
        for place, backend in self.backends.items():
            register_backend(place, f"{backend.__module__}.{backend.__qualname__}")
        cached_get_attn_backend.cache_clear()  # an earlier engine of this process may have asked
        super().__init__(vllm_config, *args, **kwargs)

    @staticmethod
    @abstractmethod
    def score_columns(
        queries: torch.Tensor, keys: torch.Tensor, log_normaliser: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """KVzip's scores; see ``ScoringMetadata``."""

    @abstractmethod
    def page_store(
        self,
        pages: torch.Tensor,
        spec: HeadPageSpec,
        builders: list[Any],
        quantization: Quantization | None,
        scales: StoredScales | None,
    ) -> PageStore:
        """Reads and compacts head pages as this worker's kernels store them.

        Args:
            pages: ``[num_pages, 2 * N * D]``.
            spec: of the KV cache group.
            builders: vLLM's metadata builders.
            quantization: how quantized pages are written; None where there are none.
            scales: of a cache of 8-bit numbers.
        """

    @abstractmethod
    def attach(self, cache: HeadPageCache, builders: list[Any]) -> Batcher:
        """Give the attention builders what they need of the cache; returns what splits batches."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """vLLM's; then a head profile is made, if it is wanted, while the memory is still free."""
        super().load_model(*args, **kwargs)
        if self._kvzip_settings.profile_to_build is None:
            return
        from vllm_kvzip.vllm_bridge.passes.profile_build import settings_with_profile

        self._kvzip_settings = settings = settings_with_profile(
            self.vllm_config, self.model_runner.get_model(), self.score_columns
        )
        values = {**self.vllm_config.additional_config, KEY: settings.to_additional_config()}
        self.vllm_config.additional_config = values

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, each as :class:`HeadPageSpec`."""
        specs = super().get_kv_cache_spec()
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        return as_head_page_specs(specs, layers, self._kvzip_settings, self.vllm_config)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Let vLLM allocate the cache, then put the head-page runtime over it."""
        super().initialize_from_config(kv_cache_config)
        self._kvzip = self._build_runtime(kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's, some of whose steps are made up: compression starts behind them."""
        result = super().compile_or_warm_up_model()
        self._kvzip_serves = True
        return result

    def kvzip_contexts(self) -> list[dict[str, Any]]:
        """For ``collective_rpc``: see :meth:`HeadPageRuntime.cached_prefixes`."""
        return [] if self._kvzip is None else self._kvzip.cached_prefixes()

    @torch.inference_mode()
    @with_gpu_sync_check
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """vLLM's step between the runtime's two halves."""
        if self._kvzip is None or not self._kvzip_serves:
            return super().execute_model(scheduler_output)
        self._kvzip.before_step(scheduler_output)
        result = super().execute_model(scheduler_output)
        self._kvzip.after_step(scheduler_output)
        return result if result is None else self._kvzip.outcomes.attach(result)

    @torch.inference_mode()
    @with_gpu_sync_check
    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's; the output of a step tells what became of the compressions at its start."""
        result = super().sample_tokens(grammar_output)
        if self._kvzip is None or result is None:  # None: the step itself has failed
            return result
        return self._kvzip.outcomes.attach(result)

    def _build_runtime(self, kv_cache_config: KVCacheConfig) -> HeadPageRuntime:
        settings = self._kvzip_settings
        config = settings.config
        (group,) = kv_cache_config.kv_cache_groups
        spec = group.kv_cache_spec
        if not isinstance(spec, HeadPageSpec):
            raise UnsupportedError(
                f"KV compression is on, but vLLM allocated {type(spec).__name__} for the KV cache."
            )
        layer_names = list(kv_cache_config.kv_cache_tensors[0].layers)
        layers = get_layers_from_vllm_config(self.vllm_config, Attention, layer_names)
        caches = [layers[name].kv_cache for name in layer_names]
        pages, pool = map_head_pages(
            kv_cache_config,
            spec,
            caches,
            layer_names,
            self.cache_config.get_resolved_kv_cache_layout(),
        )
        first = layers[layer_names[0]]
        rank = get_tensor_model_parallel_rank()
        heads_before = first_kv_head(
            rank,
            self.parallel_config.tensor_parallel_size,
            self.model_config.get_total_num_kv_heads(),
        )
        own_heads = slice(heads_before, heads_before + spec.num_kv_heads)
        geometry = CacheGeometry(
            num_layers=len(layer_names),
            num_kv_heads=spec.num_kv_heads,
            group_size=first.num_heads // spec.num_kv_heads,
            head_dim=spec.head_size,
            block_size=spec.block_size,
        )
        builders = [
            builder
            for groups in self.model_runner.attn_groups
            for attn_group in groups
            for builder in attn_group.metadata_builders
        ]
        if not builders or not all(isinstance(b, self.builder_class) for b in builders):
            wanted = " or ".join(place.name for place in self.backends)
            raise UnsupportedError(
                f"KV compression is on, but vLLM chose another attention backend than {wanted}; "
                f"remove --attention-backend."
            )
        layer_index = {name: index for index, name in enumerate(layer_names)}
        quantization = settings.quantization(spec.block_size, spec.head_size, spec.dtype.itemsize)
        repeats_with = settings.scorer if settings.repeat_ids is not None else None
        check_capped_logits(bool(first.impl.logits_soft_cap), config.mode, repeats_with)
        scales = read_scales(list(layers.values()), spec.num_kv_heads, self.model_config.dtype)
        store = self.page_store(pages, spec, builders, quantization, scales)
        cache = HeadPageCache(
            geometry,
            pool,
            pages,
            store,
            layer_index,
            quantization,
            scales,
            num_first(config.sink_tokens),
        )
        scorer = create_scorer(
            settings.scorer,
            ScorerSettings(
                config.observation_window_tokens,
                settings.surrogate,
                first_kv_head=heads_before,
            ),
        )
        rotary, model = None, self.model_runner.get_model()
        if scorer.needs_rotary:
            try:
                rotary = find_rotary(model, layer_names, self.model_config.hf_text_config)
            except UnsupportedError:
                if config.scorer is not None:
                    raise
                scorer = create_scorer(SCORER_WITHOUT_ROTARY)
                logger.warning(
                    "The rotary embedding of this model was not found, so scorer %s chooses, at "
                    "lower quality than %s.",
                    scorer.name,
                    settings.scorer,
                )
        rule = replace(spec.rule, pool_blocks=kv_cache_config.num_blocks)
        compressor = Compressor(
            geometry=geometry,
            pool=pool,
            store=store,
            rule=rule,
            scorer=scorer,
            budget=settings.budget,
            head_fractions=_own_fractions(settings, own_heads),
            head_importance=_own_heads(settings.head_importance, own_heads),
            tier_fractions=_own_tiers(settings, own_heads),
            rotary=rotary,
            seed=config.seed,
            clock=self.clock,
        )
        repeats = None
        if (repeat_rule := settings.repeat_rule(self.vllm_config)) is not None:
            assert settings.repeat_ids is not None
            reconstruction = ReconstructionPass(
                model=model,
                vllm_config=self.vllm_config,
                cache=cache,
                repeat=RepeatPrompt(*map(tuple, settings.repeat_ids)),
                rule=repeat_rule,
                num_sinks=config.sink_tokens,
                max_tokens=self.vllm_config.scheduler_config.max_num_batched_tokens,
                max_positions=num_positions(model, self.model_config),
                score_columns=self.score_columns,
            )
            num_ranks = self.parallel_config.tensor_parallel_size
            repeats = Repeats(reconstruction, self.clock, num_ranks)
        recorder = timer = None
        if rank == 0:  # the others would record the same
            recorder = WorkerRecorder(settings.metrics_directory)
            timer = AttentionTimer(recorder, self.clock)
            for layer in layers.values():
                layer.impl.timer = timer
        runtime = HeadPageRuntime(
            cache=cache,
            compressor=compressor,
            batcher=self.attach(cache, builders),
            tracker=RequestTracker(rule, keep_tokens=repeats is not None),
            rows=adapt(self.model_runner),
            recorder=recorder,
            timer=timer,
            observation_window_tokens=settings.observation_tokens,
            scale=first.impl.scale,
            repeats=repeats,
            ttl_seconds=config.reuse_ttl_seconds,
        )
        for builder in builders:
            builder.runtime = runtime
        logger.info(
            "KV compression is on: mode %s, keep ratio %s, scorer %s, budget %s, prompts from %d "
            "tokens.",
            config.mode,
            config.ratio,
            scorer.name,
            settings.budget,
            config.min_prompt_tokens,
        )
        return runtime


def _own_fractions(settings: Settings, own: slice) -> Callable[[float], list[list[float]]] | None:
    """Keep ratio -> share of its KV pairs each of this rank's heads keeps, for budgets by head."""
    if settings.head_importance is None:
        return None

    @functools.lru_cache(maxsize=64)
    def at(keep_ratio: float) -> list[list[float]]:
        fractions = _own_heads(settings.head_fractions(keep_ratio), own)
        assert fractions is not None
        return fractions

    return at


def _own_tiers(
    settings: Settings, own: slice
) -> Callable[[float], tuple[list[list[float]], list[list[float]]]] | None:
    """The same of either tier, by bytes ratio."""
    if settings.head_tiers is None:
        return None

    @functools.lru_cache(maxsize=64)
    def at(bytes_ratio: float) -> tuple[list[list[float]], list[list[float]]]:
        full, kept = (_own_heads(grid, own) for grid in settings.tier_fractions(bytes_ratio))
        assert full is not None and kept is not None
        return full, kept

    return at


def _own_heads(grid: list[list[float]] | None, own: slice) -> list[list[float]] | None:
    """The columns of this rank's KV heads."""
    return None if grid is None else [row[own] for row in grid]
