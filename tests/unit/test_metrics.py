"""Metrics reach one registry from several processes, each counted once."""

import gc
import multiprocessing
import multiprocessing.connection
import os

import pytest
from metric_processes import collected, killed_process, scheduler_process, worker_process
from prometheus_client import values

from vllm_kvzip import metrics
from vllm_kvzip.vllm_bridge.stats_export import SchedulerRecorder


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
    assert value("vllm_kvzip_kv_bytes_saved") is None  # its processes have ended
    skipped = "vllm_kvzip_requests_skipped_total"
    assert value(skipped, {"reason": "below_min_prompt_tokens"}) == 2
    assert value(skipped, {"reason": "nothing_to_free"}) == 0
    assert value("vllm_kvzip_keep_ratio_count") == 6
    assert value("vllm_kvzip_compress_seconds_sum", {"stage": "score"}) == 0.5
    assert value("vllm_kvzip_compress_seconds_count", {"stage": "compact"}) == 1


def recorder_in_use(directory):
    """The same as a process's, kept by this one."""
    recorder = SchedulerRecorder(str(directory))
    recorder.saved(24_000)
    recorder.holds(500, 2_000, 700, kept_share=0.25)
    return recorder


GAUGES = (
    "kv_bytes_saved", "eviction_ratio", "prefix_entries", "kv_bytes_held/full",
    "kv_bytes_held/compressed", "kv_bytes_held/quantized",
)  # fmt: skip


def gauges(directory):
    value = collected(directory)
    return {
        name: value(
            "vllm_kvzip_" + name.partition("/")[0],
            {"kind": name.partition("/")[2]} if "/" in name else {},
        )
        for name in GAUGES
    }


@pytest.mark.parametrize("way", ["close", "forget", "kill"])
def test_an_engine_that_is_gone_holds_nothing(tmp_path, way):
    """Two engines of one server, one of which ends, by itself or not; what it counted stays."""
    living = recorder_in_use(tmp_path)
    alone = gauges(tmp_path)
    assert alone["kv_bytes_held/compressed"] == 2_000
    if way == "kill":
        process = multiprocessing.get_context("spawn").Process(
            target=killed_process, args=(str(tmp_path),)
        )
        process.start()
        multiprocessing.connection.wait([process.sentinel], 60)  # nobody has waited for its end
    else:
        gone = recorder_in_use(tmp_path)
        gone.skipped("nothing_to_free")
        assert gauges(tmp_path)["kv_bytes_held/compressed"] == 4_000
        if way == "close":
            gone.close()
        del gone
        gc.collect()
    assert gauges(tmp_path) == alone
    reason = "below_min_prompt_tokens" if way == "kill" else "nothing_to_free"
    skipped = "vllm_kvzip_requests_skipped_total"
    assert collected(tmp_path)(skipped, {"reason": reason}) == 1
    living.close()
    assert set(gauges(tmp_path).values()) == {0}


def test_what_is_held_now_and_how_long_attention_took(tmp_path):
    """Gauges vanish with their process, so this one is this process's own."""
    first = recorder_in_use(tmp_path)
    worker_process(str(tmp_path))
    value = collected(tmp_path)
    assert value("vllm_kvzip_kv_bytes_saved") == 24_000
    assert value("vllm_kvzip_kv_bytes_held", {"kind": "compressed"}) == 2_000
    assert value("vllm_kvzip_kv_bytes_held", {"kind": "full"}) == 500
    assert value("vllm_kvzip_kv_bytes_held", {"kind": "quantized"}) == 700
    assert value("vllm_kvzip_eviction_ratio") == 0.75
    assert value("vllm_kvzip_attention_seconds_sum", {"phase": "decode"}) == 0.5
    assert value("vllm_kvzip_attention_seconds_count", {"phase": "prefill"}) == 0
    again = SchedulerRecorder(str(tmp_path))
    again.holds(0, 0, 0, kept_share=1.0)
    assert collected(tmp_path)("vllm_kvzip_eviction_ratio") == 0.75  # the highest of two engines
    first.close()
    assert collected(tmp_path)("vllm_kvzip_eviction_ratio") == 0


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
