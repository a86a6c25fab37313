"""The metrics in one table, and the writer that records them from any process.

vLLM serves ``/metrics`` from the API server, while blocks are freed in the engine core and prompts
are compressed in workers. Each of those processes writes its own file in prometheus-client's
multiprocess format; the API server adds them up (``MultiProcessCollector``).
"""

from __future__ import annotations

import itertools
import os
import weakref
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, values

if TYPE_CHECKING:
    from collections.abc import Iterator

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_writer_numbers = itertools.count()

STAGES = ("score", "select", "compact", "quantize")
FAILURES = ("not_finite", "failed")
SKIP_REASONS = (
    "below_min_prompt_tokens",
    "below_min_output_tokens",
    "nothing_to_free",
    "off_by_request",
    "no_room",
    "ended_before_decode",
    *FAILURES,
)
EVICTION_REASONS = ("lru", "ttl", "reset", "failed")
KV_KINDS = ("full", "compressed", "quantized")
TIERS = ("full", "quantized")
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class Metric:
    """One exported metric.

    Attributes:
        name: as it appears on ``/metrics``.
        kind: counter, gauge or histogram.
        help: what it counts, with its unit.
        label: the label's name, if it has one.
        label_values: every value the label takes; each is exported from the start, as zero.
        buckets: upper bounds of a histogram.
        combine: how a gauge's values of several engines become one.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str | None = None
    label_values: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    combine: Literal["livesum", "livemax"] = "livesum"


REQUESTS_COMPRESSED = Metric(
    "vllm_kvzip_requests_compressed_total",
    "counter",
    "Prompts whose KV cache was compressed and whose blocks went back to the pool.",
)
REQUESTS_SKIPPED = Metric(
    "vllm_kvzip_requests_skipped_total",
    "counter",
    "Prompts that were left alone, by reason.",
    label="reason",
    label_values=SKIP_REASONS,
)
BLOCKS_FREED = Metric(
    "vllm_kvzip_blocks_freed_total",
    "counter",
    "KV cache blocks compression returned to the pool, net of those that hold what is kept.",
)
TOKENS_EVICTED = Metric(
    "vllm_kvzip_tokens_evicted_total",
    "counter",
    "Evicted tokens: KV pairs dropped, averaged over layers and KV heads.",
)
TOKENS_KEPT = Metric(
    "vllm_kvzip_tokens_kept_total",
    "counter",
    "Tokens kept by compression: KV pairs kept as they are, or quantized, averaged over layers and "
    "KV heads.",
    label="tier",
    label_values=TIERS,
)
KV_BYTES_SAVED = Metric(
    "vllm_kvzip_kv_bytes_saved",
    "gauge",
    "Bytes of KV cache that compressed requests, now running, do without.",
)
KV_BYTES_HELD = Metric(
    "vllm_kvzip_kv_bytes_held",
    "gauge",
    "Bytes of KV cache that running requests hold: compressed prefixes, but for their quantized "
    "pages, these, and everything else.",
    label="kind",
    label_values=KV_KINDS,
)
EVICTION_RATIO = Metric(
    "vllm_kvzip_eviction_ratio",
    "gauge",
    "Evicted / all KV pairs of the compressed prefixes in use, 0 when there is none; of several "
    "engines the highest.",
    combine="livemax",
)
PREFILL_ROUNDS = Metric(
    "vllm_kvzip_prefill_rounds_total",
    "counter",
    "Times a request was compressed because its prompt had filled its prefill budget.",
)
DECODE_ROUNDS = Metric(
    "vllm_kvzip_decode_rounds_total",
    "counter",
    "Times a request was compressed because its answer had filled its decode or prefill budget.",
)
KEEP_RATIO = Metric(
    "vllm_kvzip_keep_ratio",
    "histogram",
    "Achieved keep ratio of a prompt: KV pairs kept / all, the dense tail included.",
    buckets=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
)
ESTIMATED_LOSS = Metric(
    "vllm_kvzip_estimated_loss",
    "histogram",
    "What compressing a prompt costs by estimate, in nats a token, where a quality loss decides.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0),
)
COMPRESS_SECONDS = Metric(
    "vllm_kvzip_compress_seconds",
    "histogram",
    "Seconds a worker spent on one prompt, by stage.",
    label="stage",
    label_values=STAGES,
    buckets=(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)
ATTENTION_SECONDS = Metric(
    "vllm_kvzip_attention_seconds",
    "histogram",
    "Seconds of attention in one step of the model, all layers, of a sample of the steps; a step "
    "with any prompt token is a prefill.",
    label="phase",
    label_values=PHASES,
    buckets=(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
PREFIX_HITS = Metric(
    "vllm_kvzip_prefix_hits_total",
    "counter",
    "Requests that started from a compressed prefix.",
)
PREFIX_HIT_TOKENS = Metric(
    "vllm_kvzip_prefix_hit_tokens_total",
    "counter",
    "Prompt tokens that were not prefilled because their compressed prefix was cached.",
)
PREFIX_ENTRIES = Metric(
    "vllm_kvzip_prefix_entries",
    "gauge",
    "Compressed prefixes in the prefix cache.",
)
PREFIX_EVICTIONS = Metric(
    "vllm_kvzip_prefix_evictions_total",
    "counter",
    "Compressed prefixes that left the prefix cache, by reason.",
    label="reason",
    label_values=EVICTION_REASONS,
)

METRICS = (
    REQUESTS_COMPRESSED,
    REQUESTS_SKIPPED,
    BLOCKS_FREED,
    TOKENS_EVICTED,
    TOKENS_KEPT,
    KV_BYTES_SAVED,
    KV_BYTES_HELD,
    PREFILL_ROUNDS,
    DECODE_ROUNDS,
    EVICTION_RATIO,
    KEEP_RATIO,
    ESTIMATED_LOSS,
    COMPRESS_SECONDS,
    ATTENTION_SECONDS,
    PREFIX_HITS,
    PREFIX_HIT_TOKENS,
    PREFIX_ENTRIES,
    PREFIX_EVICTIONS,
)


class MetricsWriter:
    """Records some of the metrics from this process.

    Args:
        metrics: which ones; each should be written by one kind of process only.
        directory: folder of the metric files. The gauges of a writer become 0 when it is closed or
            garbage-collected. None when the environment's ``PROMETHEUS_MULTIPROC_DIR`` was set
            before prometheus-client was imported: then prometheus-client writes its files there by
            itself and vLLM adds them up, and gauges become 0 when the writer is closed.
    """

    def __init__(self, metrics: tuple[Metric, ...], directory: str | None) -> None:
        registry = CollectorRegistry()
        self._metrics: dict[str, Counter | Gauge | Histogram] = {}
        gauges: list[Gauge] = []
        with _files_in(directory):
            for metric in metrics:
                instrument = _create(metric, registry)
                children = [instrument.labels(value) for value in metric.label_values]
                gauges += [i for i in children or [instrument] if isinstance(i, Gauge)]
                self._metrics[metric.name] = instrument
        self._gauges = gauges
        # Only for a writer with a lock of its own: a garbage collection can come at any time, also
        # while this thread holds the lock that all other metrics of the process share.
        if directory is not None:
            finalizer = weakref.finalize(self, _set_to_zero, gauges)
            finalizer.atexit = False  # files of a process that has ended do not count

    def close(self) -> None:
        """Set every gauge to 0: what it was about has ended."""
        _set_to_zero(self._gauges)

    def add(self, metric: Metric, amount: float, label: str | None = None) -> None:
        """Add to a counter, or to a gauge (there ``amount`` may be negative)."""
        instrument = self._metrics[metric.name]
        target = instrument if label is None else instrument.labels(label)
        assert isinstance(target, Counter | Gauge)
        target.inc(amount)

    def set(self, metric: Metric, value: float, label: str | None = None) -> None:
        """Set a gauge."""
        instrument = self._metrics[metric.name]
        target = instrument if label is None else instrument.labels(label)
        assert isinstance(target, Gauge)
        target.set(value)

    def observe(self, metric: Metric, amount: float, label: str | None = None) -> None:
        """Put one observation into a histogram."""
        instrument = self._metrics[metric.name]
        target = instrument if label is None else instrument.labels(label)
        assert isinstance(target, Histogram)
        target.observe(amount)


def forget_ended_processes(directory: str) -> None:
    """Remove the gauges of processes that have ended, however they ended.

    Args:
        directory: folder of metric files of processes of this machine.
    """
    for path in Path(directory).glob("gauge_live*_*.db"):
        identity = path.stem.rsplit("_", 1)[-1]
        number = identity.split("-")[0]
        if number.isdecimal() and not _runs(int(number)):
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except (OSError, IndexError):  # no such file system, or it has ended just now
        return True
    return state not in ("Z", "X")


def _set_to_zero(gauges: list[Gauge]) -> None:
    for gauge in gauges:
        gauge.set(0)


def _create(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    labels = () if metric.label is None else (metric.label,)
    if metric.kind == "counter":
        return Counter(metric.name, metric.help, labels, registry=registry)
    if metric.kind == "gauge":
        return Gauge(
            metric.name, metric.help, labels, registry=registry, multiprocess_mode=metric.combine
        )
    return Histogram(metric.name, metric.help, labels, registry=registry, buckets=metric.buckets)


@contextmanager
def _files_in(directory: str | None) -> Iterator[None]:
    """Let metrics created inside keep their values in files of ``directory``.

    prometheus-client chooses between values in memory and values in files once, when it is
    imported, from an environment variable. vLLM imports it long before a worker can set that
    variable, so the choice is made again here, for the metrics created inside only.
    """
    if directory is None:
        yield
        return
    os.makedirs(directory, exist_ok=True)  # gone from /tmp, or never there on another node
    previous_class = values.ValueClass
    previous_directory = os.environ.get(DIRECTORY_VARIABLE)
    identity = f"{os.getpid()}-{next(_writer_numbers)}"  # one file per writer, not per process
    values.ValueClass = values.MultiProcessValue(lambda: identity)  # type: ignore[no-untyped-call]
    os.environ[DIRECTORY_VARIABLE] = directory
    try:
        yield
    finally:
        values.ValueClass = previous_class
        if previous_directory is None:
            del os.environ[DIRECTORY_VARIABLE]
        else:
            os.environ[DIRECTORY_VARIABLE] = previous_directory
