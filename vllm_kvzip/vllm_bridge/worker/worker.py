"""What compression adds to vLLM's workers, whatever they run on.

``parallel_config.worker_cls`` is vLLM's own way to name a worker, so nothing is patched in the
worker process: a process without compression never imports this file. ``cpu_worker.py`` and
``gpu_worker.py`` say what differs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from vllm_kvzip.vllm_bridge.attention.draft_layers import draft_layer_names
from vllm_kvzip.vllm_bridge.cache.cache_spec import as_head_page_specs
from vllm_kvzip.vllm_bridge.contexts.transfers import NOT_YET
from vllm_kvzip.vllm_bridge.settings import KEY, Settings
from vllm_kvzip.vllm_bridge.symbols import (
    AttentionLayerBase,
    WorkerBase,
    cached_get_attn_backend,
    get_layers_from_vllm_config,
    register_backend,
    with_gpu_sync_check,
)
from vllm_kvzip.vllm_bridge.worker.assembly import assemble_runtime

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.core import CacheGeometry, PrefixPlan
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.storage.stored_scales import StoredScales
    from vllm_kvzip.vllm_bridge.attention.batches import Batcher
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache
    from vllm_kvzip.vllm_bridge.symbols import (
        AttentionBackendEnum,
        KVCacheConfig,
        KVCacheSpec,
        SchedulerOutput,
    )
    from vllm_kvzip.vllm_bridge.worker.head_page_runtime import HeadPageRuntime


class HeadPageWorker(WorkerBase):
    """Mixed into one of vLLM's workers; compresses prompts between steps.

    Attributes:
        backends: our attention backends, by the one of vLLM whose place they take.
        clock: measures the work of this worker's device.
        kvzip_settings: resolved settings of this engine.
    """

    backends: ClassVar[Mapping[AttentionBackendEnum, type]]
    clock: ClassVar[Clock]

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        self.kvzip_settings = Settings.from_vllm_config(vllm_config)
        self._kvzip: HeadPageRuntime | None = None
        self._kvzip_serves = False
        for place, backend in self.backends.items():
            register_backend(place, f"{backend.__module__}.{backend.__qualname__}")
        cached_get_attn_backend.cache_clear()  # an earlier engine of this process may have asked
        super().__init__(vllm_config, *args, **kwargs)

    @staticmethod
    @abstractmethod
    def score_columns(
        queries: torch.Tensor,
        keys: torch.Tensor,
        log_normaliser: torch.Tensor,
        scale: float,
        soft_cap: float | None,
    ) -> torch.Tensor:
        """KVzip's scores; see ``ScoringMetadata``."""

    @abstractmethod
    def page_store(
        self,
        pages: torch.Tensor,
        geometry: CacheGeometry,
        builders: list[Any],
        quantization: Quantization | None,
        scales: StoredScales | None,
    ) -> PageStore:
        """Reads and compacts head pages as this worker's kernels store them.

        Args:
            pages: ``[num_pages, 2 * N * D]``.
            geometry: of the compressed layers.
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
        if self.kvzip_settings.profile_to_build is None:
            return
        from vllm_kvzip.vllm_bridge.passes.profile_build import settings_with_profile

        self.kvzip_settings = settings = settings_with_profile(
            self.vllm_config, self.model_runner.get_model(), self.score_columns
        )
        values = {**self.vllm_config.additional_config, KEY: settings.to_additional_config()}
        self.vllm_config.additional_config = values

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """vLLM's specs, each as :class:`HeadPageSpec`."""
        specs = super().get_kv_cache_spec()
        layers = get_layers_from_vllm_config(self.vllm_config, AttentionLayerBase)
        drafts = draft_layer_names(self.model_runner)
        return as_head_page_specs(specs, layers, self.kvzip_settings, self.vllm_config, drafts)

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Let vLLM allocate the cache, then put the head-page runtime over it."""
        super().initialize_from_config(kv_cache_config)
        self._kvzip = assemble_runtime(self, kv_cache_config)

    def compile_or_warm_up_model(self) -> Any:
        """vLLM's, which runs steps of made-up requests; compression starts after them."""
        result = super().compile_or_warm_up_model()
        self._kvzip_serves = True
        return result

    def kvzip_contexts(self) -> list[dict[str, Any]]:
        """For ``collective_rpc``: see :meth:`WorkerPrefixes.cached`."""
        return [] if self._kvzip is None else self._kvzip.prefixes.cached()

    def kvzip_record_kept(self, request_id: str) -> None:
        """For ``collective_rpc``: see :meth:`KeptRecords.want`."""
        if self._kvzip is not None:
            self._kvzip.records.want(request_id)

    @torch.inference_mode()
    def kvzip_kept(self, request_id: str) -> dict[str, Any] | None:
        """For ``collective_rpc``: see :meth:`KeptRecords.take`."""
        return None if self._kvzip is None else self._kvzip.records.take(request_id)

    @torch.inference_mode()
    def kvzip_read_context(self, serial: int) -> dict[str, torch.Tensor] | None:
        """For ``collective_rpc``: see :meth:`ContextPages.read`."""
        return None if self._kvzip is None else self._kvzip.contexts.read(serial)

    @torch.inference_mode()
    def kvzip_write_context(
        self, serial: int, plan: PrefixPlan, seed: int, block_ids: list[int], tensors: Any
    ) -> str | None:
        """For ``collective_rpc``: see :meth:`ContextPages.write`; or ``NOT_YET``."""
        assert self._kvzip is not None
        if self._kvzip.will_read(block_ids):
            return NOT_YET
        return self._kvzip.contexts.write(serial, plan, seed, block_ids, tensors)

    @torch.inference_mode()
    @with_gpu_sync_check
    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """vLLM's step between the runtime's two halves."""
        if self._kvzip is None or not self._kvzip_serves:
            return super().execute_model(scheduler_output)
        self._kvzip.before_step(scheduler_output)
        result = super().execute_model(scheduler_output)
        self._kvzip.after_step(scheduler_output)
        return result if result is None else self._kvzip.attach_outcomes(result)

    @torch.inference_mode()
    @with_gpu_sync_check
    def sample_tokens(self, grammar_output: Any) -> Any:
        """vLLM's; the output of a step tells what became of the compressions at its start."""
        result = super().sample_tokens(grammar_output)
        if self._kvzip is None or result is None:  # None: the step itself has failed
            return result
        return self._kvzip.attach_outcomes(result)
