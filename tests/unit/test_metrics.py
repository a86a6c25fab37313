"""Metrics reach one registry from several processes, each counted once."""

import multiprocessing
import os

from metric_processes import scheduler_process, worker_process
from prometheus_client import CollectorRegistry, values
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_kvzip import metrics
from vllm_kvzip.vllm_bridge.stats_export import SchedulerRecorder


def collected(directory):
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(directory))
    return registry.get_sample_value


def test_processes_add_up(tmp_path):
    context = multiprocessing.get_context("spawn")
    targets = [scheduler_process, scheduler_process, worker_process]
    processes = [context.Process(target=target, args=(str(tmp_path),)) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    value = collected(tmp_path)
    assert value("vllm_kvzip_requests_compressed_total") == 6
    assert value("vllm_kvzip_blocks_freed_total") == 2 * (24 + 12 + 23)
    in_tiers = 3 * 32, 6 * 120
    assert value("vllm_kvzip_tokens_evicted_total") == 2 * (36 * 32 + 1024 - sum(in_tiers))
    kept = "vllm_kvzip_tokens_kept_total"
    assert value(kept, {"tier": "full"}) == 2 * (8 * 32 + 4 * 32 + in_tiers[0])
    assert value(kept, {"tier": "quantized"}) == 2 * in_tiers[1]
    assert value("vllm_kvzip_kv_bytes_saved") == 48_000
    skipped = "vllm_kvzip_requests_skipped_total"
    assert value(skipped, {"reason": "below_min_prompt_tokens"}) == 2
    assert value(skipped, {"reason": "nothing_to_free"}) == 0
    assert value("vllm_kvzip_keep_ratio_count") == 6
    assert value("vllm_kvzip_compress_seconds_sum", {"stage": "score"}) == 0.5
    assert value("vllm_kvzip_compress_seconds_count", {"stage": "compact"}) == 1


def test_what_is_held_now_and_how_long_attention_took(tmp_path):
    """Gauges vanish with their process, so this one is this process's own."""
    scheduler_process(str(tmp_path))
    worker_process(str(tmp_path))
    value = collected(tmp_path)
    assert value("vllm_kvzip_kv_bytes_held", {"kind": "compressed"}) == 2_000
    assert value("vllm_kvzip_kv_bytes_held", {"kind": "full"}) == 500
    assert value("vllm_kvzip_kv_bytes_held", {"kind": "quantized"}) == 700
    assert value("vllm_kvzip_eviction_ratio") == 0.75
    assert value("vllm_kvzip_attention_seconds_sum", {"phase": "decode"}) == 0.5
    assert value("vllm_kvzip_attention_seconds_count", {"phase": "prefill"}) == 0
    again = SchedulerRecorder(str(tmp_path))
    again.holds(0, 0, 0, kept_share=1.0)
    assert collected(tmp_path)("vllm_kvzip_eviction_ratio") == 0.75  # the highest of two engines


def test_two_writers_of_one_process_do_not_disturb_each_other(tmp_path):
    first, second = SchedulerRecorder(str(tmp_path)), SchedulerRecorder(str(tmp_path))
    for _ in range(3):
        first.skipped("nothing_to_free")
        second.skipped("nothing_to_free")
    value = collected(tmp_path)
    assert value("vllm_kvzip_requests_skipped_total", {"reason": "nothing_to_free"}) == 6


def test_other_metrics_of_the_process_keep_their_values_in_memory(tmp_path):
    value_class = values.ValueClass
    SchedulerRecorder(str(tmp_path))
    assert values.ValueClass is value_class
    assert metrics.DIRECTORY_VARIABLE not in os.environ


def test_every_metric_is_in_the_readme():
    readme = (metrics.__file__.rsplit("/", 2)[0]) + "/README.md"
    with open(readme, encoding="utf-8") as file:
        text = file.read()
    for metric in metrics.METRICS:
        assert metric.name in text
