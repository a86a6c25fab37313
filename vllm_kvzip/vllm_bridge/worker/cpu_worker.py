"""The worker class that compression puts in place of vLLM's on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vllm_kvzip.clocks import HostClock
from vllm_kvzip.planning.reconstruction import scores_from_normaliser
from vllm_kvzip.storage.page_store import PackedPages
from vllm_kvzip.vllm_bridge.attention.cpu_attention import HeadPageCPUBackend
from vllm_kvzip.vllm_bridge.attention.head_sequence_batches import HeadSequenceBatcher
from vllm_kvzip.vllm_bridge.cache.cpu_pages import discover_codec
from vllm_kvzip.vllm_bridge.symbols import AttentionBackendEnum, CPUWorker
from vllm_kvzip.vllm_bridge.worker.worker import HeadPageWorker

if TYPE_CHECKING:
    import torch

    from vllm_kvzip.clocks import Clock
    from vllm_kvzip.core import CacheGeometry
    from vllm_kvzip.quantization import Quantization
    from vllm_kvzip.storage.page_store import PageStore
    from vllm_kvzip.storage.stored_scales import StoredScales
    from vllm_kvzip.vllm_bridge.attention.batches import Batcher
    from vllm_kvzip.vllm_bridge.cache.head_page_cache import HeadPageCache


class HeadPageCPUWorker(HeadPageWorker, CPUWorker):
    """vLLM's CPU worker, which compresses prompts between steps."""

    backends: ClassVar = {AttentionBackendEnum.CPU_ATTN: HeadPageCPUBackend}
    clock: ClassVar[Clock] = HostClock()
    score_columns = staticmethod(scores_from_normaliser)

    def page_store(
        self,
        pages: torch.Tensor,
        geometry: CacheGeometry,
        builders: list[Any],
        quantization: Quantization | None,
        scales: StoredScales | None,
    ) -> PageStore:
        """See :class:`HeadPageWorker`; the kernel packs elements in an order that is found out."""
        assert scales is None  # refused at start-up
        shape = geometry.page_tokens, geometry.head_dim
        codec = discover_codec(*shape, pages.dtype, builders[0].isa)
        return PackedPages(pages, codec, *shape, quantization)

    def attach(self, cache: HeadPageCache, builders: list[Any]) -> Batcher:
        """See :class:`HeadPageWorker`."""
        return HeadSequenceBatcher(cache, builders[0].isa)
