"""Metrics: who records what in which vLLM process, and how they reach the server's ``/metrics``.

The engine core's block manager knows what was freed (it follows from the prompt length alone); a
worker knows how long compression took. Both write files; the API server's own registry collects
them, so no second port and no message is needed.
"""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING, Any

from prometheus_client import REGISTRY
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_kvzip import metrics

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm_kvzip.core import PrefixPlan
    from vllm_kvzip.vllm_bridge.symbols import BlockPool

FOLDER_VARIABLE = "KVZIP_METRICS_DIRECTORY"
"""Tells the processes of an engine where their metric files go.

It differs from run to run, so it must not be part of vLLM's configuration, of which a hash names
the compiled model in vLLM's cache.
"""

_directory: tempfile.TemporaryDirectory[str] | None = None


class LiveCollector(MultiProcessCollector):
    """Adds up the metric files of a folder; gauges of processes that have ended do not count."""

    def collect(self) -> Any:
        """See prometheus-client."""
        metrics.forget_ended_processes(self._path)
        return super().collect()


def open_metrics_directory() -> str | None:
    """Prepare the folder for metric files of this process's engines and collect it.

    Called in the process that serves ``/metrics`` (or that owns the offline ``LLM``), once for all
    its engines; the folder is removed when the process ends.

    Returns:
        the folder, or None when ``PROMETHEUS_MULTIPROC_DIR`` is set: vLLM then serves every file of
        that folder, ours included.
    """
    global _directory
    os.environ.pop(FOLDER_VARIABLE, None)
    if os.environ.get(metrics.DIRECTORY_VARIABLE):
        return None
    if _directory is None:
        _directory = tempfile.TemporaryDirectory(prefix="vllm-kvzip-metrics-")
        LiveCollector(REGISTRY, path=_directory.name)
    os.environ[FOLDER_VARIABLE] = _directory.name
    return _directory.name


class SchedulerRecorder:
    """What the block manager counts, in the engine core."""

    def __init__(self, directory: str | None) -> None:
        self._writer = metrics.MetricsWriter(
            (
                metrics.REQUESTS_COMPRESSED,
                metrics.REQUESTS_SKIPPED,
                metrics.BLOCKS_FREED,
                metrics.TOKENS_EVICTED,
                metrics.TOKENS_KEPT,
                metrics.KV_BYTES_SAVED,
                metrics.KV_BYTES_HELD,
                metrics.PREFILL_ROUNDS,
                metrics.DECODE_ROUNDS,
                metrics.EVICTION_RATIO,
                metrics.KEEP_RATIO,
                metrics.ESTIMATED_LOSS,
                metrics.PREFIX_HITS,
                metrics.PREFIX_HIT_TOKENS,
                metrics.PREFIX_ENTRIES,
                metrics.PREFIX_EVICTIONS,
            ),
            directory,
        )
        self._held: tuple[float, ...] = (0, 0, 0, 1.0)

    def close(self) -> None:
        """Remove the engine's gauges, because it ends and holds nothing."""
        self._writer.close()

    def holds(
        self, full_bytes: int, compressed_bytes: int, quantized_bytes: int, kept_share: float
    ) -> None:
        """What running requests hold, after a step was scheduled.

        Args:
            full_bytes: in blocks of no compressed prefix.
            compressed_bytes: in compressed prefixes, of KV pairs as they are.
            quantized_bytes: in compressed prefixes, of quantized KV pairs.
            kept_share: kept / all KV pairs of those prefixes; 1 when there is none.
        """
        held = (full_bytes, compressed_bytes, quantized_bytes, kept_share)
        if held == self._held:
            return
        self._held = held
        for kind, num_bytes in zip(metrics.KV_KINDS, held, strict=False):
            self._writer.set(metrics.KV_BYTES_HELD, num_bytes, kind)
        self._writer.set(metrics.EVICTION_RATIO, 1 - kept_share)

    def compressed(self, plan: PrefixPlan, num_prompt_tokens: int, block_size: int) -> None:
        """Count one compression, whose blocks went back to the pool."""
        self._writer.add(metrics.BLOCKS_FREED, plan.num_freed_blocks)
        num_source_tokens = plan.num_candidate_tokens or plan.num_source_blocks * block_size
        self._writer.add(metrics.TOKENS_EVICTED, num_source_tokens - plan.kept_tokens)
        if plan.is_round:
            in_prompt = plan.boundary_tokens <= num_prompt_tokens
            self._writer.add(metrics.PREFILL_ROUNDS if in_prompt else metrics.DECODE_ROUNDS, 1)
            return
        self._writer.add(metrics.TOKENS_KEPT, plan.full_tokens, "full")
        self._writer.add(metrics.TOKENS_KEPT, plan.quantized_tokens, "quantized")
        self._writer.add(metrics.REQUESTS_COMPRESSED, 1)
        evicted = (plan.boundary_tokens - plan.kept_tokens) / num_prompt_tokens
        self._writer.observe(metrics.KEEP_RATIO, 1 - evicted)
        if plan.estimated_loss is not None:
            self._writer.observe(metrics.ESTIMATED_LOSS, plan.estimated_loss)

    def saved(self, num_bytes: int) -> None:
        """Add bytes that running requests save (a negative number when they save fewer again)."""
        self._writer.add(metrics.KV_BYTES_SAVED, num_bytes)

    def prefix_hit(self, num_tokens: int) -> None:
        """Count a request that starts from a compressed prefix of ``num_tokens`` tokens."""
        self._writer.add(metrics.PREFIX_HITS, 1)
        self._writer.add(metrics.PREFIX_HIT_TOKENS, num_tokens)

    def prefix_cached(self) -> None:
        """Count a compressed prefix that enters the prefix cache."""
        self._writer.add(metrics.PREFIX_ENTRIES, 1)

    def prefix_evicted(self, reason: str) -> None:
        """Count one that leaves it; ``reason`` is one of ``metrics.EVICTION_REASONS``."""
        self._writer.add(metrics.PREFIX_ENTRIES, -1)
        self._writer.add(metrics.PREFIX_EVICTIONS, 1, reason)

    def skipped(self, reason: str) -> None:
        """Count a prompt that is left alone; ``reason`` is one of ``metrics.SKIP_REASONS``."""
        self._writer.add(metrics.REQUESTS_SKIPPED, 1, reason)


class HeldBytes:
    """What running requests hold, in and beyond compressed prefixes.

    Args:
        pool: vLLM's block pool.
        block_bytes: of one block of the pool, over all layers of a KV cache group and all ranks.
        recorder: gets the figures.
    """

    def __init__(self, pool: BlockPool, block_bytes: int, recorder: SchedulerRecorder) -> None:
        self._pool = pool
        self._block_bytes = block_bytes
        self._recorder = recorder
        self._full_blocks = self._quantized_blocks = 0  # of prefixes in use
        self._tokens_before = self._tokens_kept = 0

    def add(self, plan: PrefixPlan, count: int) -> None:
        """Add ``count`` prefixes of that plan to those in use (negative: take them away)."""
        self._full_blocks += count * (plan.num_compressed_blocks - plan.num_quantized_blocks)
        self._quantized_blocks += count * plan.num_quantized_blocks
        self._tokens_before += count * plan.boundary_tokens
        self._tokens_kept += count * plan.kept_tokens
        self._recorder.saved(count * plan.num_saved_blocks * self._block_bytes)

    def report(self) -> None:
        """Record what is held now."""
        held = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
        in_prefixes = self._full_blocks + self._quantized_blocks
        self._recorder.holds(
            (held - in_prefixes) * self._block_bytes,
            self._full_blocks * self._block_bytes,
            self._quantized_blocks * self._block_bytes,
            self._tokens_kept / self._tokens_before if self._tokens_before else 1.0,
        )


class WorkerRecorder:
    """What a worker measures."""

    def __init__(self, directory: str | None) -> None:
        self._writer = metrics.MetricsWriter(
            (metrics.COMPRESS_SECONDS, metrics.ATTENTION_SECONDS), directory
        )

    def attended(self, phase: str, seconds: float) -> None:
        """Record the time of attention in one step; ``phase`` is one of ``metrics.PHASES``."""
        self._writer.observe(metrics.ATTENTION_SECONDS, seconds, phase)

    def compressed(self, stage_seconds: Mapping[str, float]) -> None:
        """Record the time that the compression of one prompt took, by stage."""
        for stage, seconds in stage_seconds.items():
            self._writer.observe(metrics.COMPRESS_SECONDS, seconds, stage)
