"""What the processes of a server record, for a test that starts them."""

import os

from prometheus_client import CollectorRegistry

from vllm_kvzip.core import PrefixPlan
from vllm_kvzip.vllm_bridge.stats_export import LiveCollector, SchedulerRecorder, WorkerRecorder


def collected(directory):
    """Looks up a metric as a server would show it."""
    registry = CollectorRegistry()
    LiveCollector(registry, path=str(directory))
    return registry.get_sample_value


def scheduler_process(directory):
    recorder = SchedulerRecorder(directory)
    recorder.compressed(PrefixPlan(1024, 32, 8, 1030, 0.25), 1030, 32)
    recorder.saved(24_000)
    recorder.compressed(PrefixPlan(512, 16, 4, 512, 0.25), 512, 32)
    recorder.saved(12_000)
    recorder.saved(-12_000)
    recorder.skipped("below_min_prompt_tokens")
    recorder.compressed(
        PrefixPlan(1024, 32, 9, 1030, 0.125, num_quantized_blocks=6, quantized_page_tokens=120),
        1030,
        32,
    )
    recorder.holds(500, 2_000, 700, kept_share=0.25)


def worker_process(directory):
    recorder = WorkerRecorder(directory)
    recorder.compressed({"score": 0.5, "select": 0.25, "compact": 0.125})
    recorder.attended("decode", 0.5)


def killed_process(directory):
    scheduler_process(directory)
    os._exit(9)
