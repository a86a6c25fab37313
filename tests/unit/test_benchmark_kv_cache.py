"""What the KV cache benchmark makes of the engines' figures: medians, table, JSON, refusals."""

import json
from argparse import Namespace
from types import SimpleNamespace

import benchmark_kv_cache
import pytest

from benchmarks.kv_cache_report import (
    HEADINGS,
    binned,
    draw,
    figures,
    nothing_compressed,
    percentile,
    prefill_limit,
    prefill_seconds,
    profile_table,
    summarise,
    table,
)
from benchmarks.kv_cache_run import Load, PoolWatch, short_reason
from benchmarks.kv_cache_shapes import SHAPES, in_words, write_shape
from benchmarks.step_profile import PARTS, StepClock


def run(seconds=10.0, *, compressed=0, freed=0, running=4.0, **changes):
    """A run of 8 requests of 16 output tokens, as the engine's process returns it."""
    return {
        "total_seconds": seconds,
        "ttft_seconds": [0.1 * number for number in range(1, 9)],
        "tpot_seconds": [0.01] * 7 + [0.05],
        "output_tokens": 8 * 16,
        "running_peak": 4,
        "running_mean": running,
        "preemptions": 1,
        "block_bytes": 2**20,
        "pool_blocks": 40,
        "blocks_peak": 40,
        "blocks_mean": 30.5,
        "plugin": {
            "requests_compressed": compressed,
            "blocks_freed": freed,
            "tokens_evicted": 0,
            "compressions": compressed,
            "compress_seconds": 0.05 * compressed,
        },
        "steps": 100,
        "prefill_steps": 8,
        "prefill_steps_seconds": 0.48 * seconds,
        "decode_step_seconds": 0.01 * seconds,
        "profile": {"scheduler": 1.0, "attention": 3.0, "rest of model": 4.0},
        "series": {"seconds": [0.0, 1.0], "running": [4, 2], "blocks": [40, 20]},
        **changes,
    }


def test_percentiles_interpolate():
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 50) == 2.5
    assert percentile(values, 0) == 1 and percentile(values, 100) == 4
    assert percentile(range(101), 99) == 99
    assert percentile([7.0], 99) == 7


def test_prefill_is_what_its_steps_take_beyond_a_decode_step():
    assert prefill_seconds(run(10.0)) == pytest.approx(4.8 - 8 * 0.1)
    assert prefill_seconds(run(10.0, compressed=8)) == pytest.approx(4.8 - 8 * 0.1 - 8 * 0.05)
    assert prefill_seconds(run(10.0, prefill_steps=100)) == 0


def test_figures_of_a_run():
    found = figures(run(compressed=8, freed=24))
    assert found["compression_share"] == pytest.approx(0.4 / 3.6)
    assert found["tokens_per_second"] == pytest.approx(12.8)
    assert found["tpot_p99_seconds"] > found["tpot_median_seconds"] == 0.01
    assert found["kv_mean_bytes"] == 30.5 * 2**20
    assert figures(run())["compression_share"] == 0


def test_ratios_are_taken_within_a_round():
    """A machine that is twice as slow in one round changes no ratio."""
    results = {
        "stock": [run(10.0), run(20.0), run(40.0)],
        "keep 0.25": [run(s, compressed=8, freed=24, running=8.0) for s in (5.0, 10.0, 20.0)],
    }
    row = summarise(results)["keep 0.25"]
    assert row["tokens_per_second_to_stock"] == pytest.approx(2)
    assert row["total_seconds"] == 10
    assert row["running_mean_to_stock"] == 2


def test_the_table_has_a_line_per_variant_and_says_what_was_refused():
    rows = summarise(
        {
            "stock": [run()],
            "fp8 cache": [{"refused": "FP8 KV cache on CPU requires AVX-512"}],
            "keep 0.25": [run(5.0, compressed=8, freed=24)],
        }
    )
    heading, rule, stock, refused, compressed = table(rows).splitlines()
    assert {line.count("|") for line in (heading, rule, stock, refused, compressed)} == {
        len(HEADINGS) + 1
    }
    assert "refused: FP8 KV cache on CPU requires AVX-512" in refused
    cells = [cell.strip() for cell in compressed.split("|")[1:-1]]
    named = dict(zip(HEADINGS, cells, strict=False))
    assert cells[:4] == ["keep 0.25", "25.6", "2.00", "5.0"]
    assert named["compression / prefill"] == "25.0%" and named["blocks freed"] == "24"
    assert [cell.strip() for cell in stock.split("|")[-3:-1]] == ["", ""]


@pytest.mark.parametrize(
    ("name", "settings", "counted", "says"),
    [
        ("keep 0.25", {"keep_ratio": 0.25}, (8, 24), ""),
        ("keep 0.25", {"keep_ratio": 0.25}, (0, 0), "compressed no prompt"),
        ("keep 0.25", {"keep_ratio": 0.25}, (8, 0), "freed no block"),
        ("keep 1", {"keep_ratio": 1.0}, (8, 0), ""),
        ("keep 1", {"keep_ratio": 1.0}, (0, 0), "compressed no prompt"),
        ("idle", {"keep_ratio": 0.5}, (0, 0), ""),
        ("idle", {"keep_ratio": 0.5}, (8, 24), "was not idle"),
        ("fp8 cache", None, (0, 0), ""),
    ],
)
def test_a_variant_that_did_not_do_what_it_says_is_refused(name, settings, counted, says):
    compressed, freed = counted
    results = {"stock": [run()], name: [run(compressed=compressed, freed=freed)]}
    fault = nothing_compressed({"stock": None, name: settings}, results)
    assert (says in fault and name in fault) if says else fault == ""


def test_one_round_without_compression_among_many_is_refused_too():
    quarter = {"stock": None, "keep 0.25": {"keep_ratio": 0.25}}
    compressed = run(compressed=8, freed=24)
    results = {"stock": [run()] * 3, "keep 0.25": [compressed, run(), compressed]}
    assert "compressed no prompt" in nothing_compressed(quarter, results)


def test_a_cache_type_that_vllm_refuses_is_no_fault():
    results = {"stock": [run()], "fp8 cache": [{"refused": "no"}]}
    assert nothing_compressed({"stock": None, "fp8 cache": None}, results) == ""


def test_what_prefill_leaves_to_gain():
    assert prefill_limit(summarise({"stock": [run()]})) == pytest.approx((0.4, 2.5))
    assert prefill_limit(summarise({"stock": [run(prefill_steps_seconds=0.0)]})) == (0, 0)


def test_a_profile_is_shares_of_the_steps():
    lines = profile_table({"stock": [run()], "fp8 cache": [{"refused": "no"}]}).splitlines()
    assert len(lines) == 3
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells[:5] == ["stock", "100", "80.0", "8", "48.0%"]
    shares = dict(zip(PARTS, cells[5:], strict=True))
    assert (shares["scheduler"], shares["attention"]) == ("12.5%", "37.5%")
    assert (shares["compression"], shares["rest of engine"]) == ("0.0%", "0.0%")


def test_a_second_inside_two_parts_counts_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.step_profile.time.perf_counter", lambda: now[0])

    def work(seconds):
        now[0] += seconds

    model = SimpleNamespace(attend=lambda: work(3))
    model.forward = lambda: (work(1), model.attend(), model.attend())
    clock = StepClock()
    clock.time(model, "attend", "attention")
    clock.time(model, "forward", "rest of model")
    model.forward()
    assert clock.seconds == {"attention": 6, "rest of model": 1}


class Pool:
    """Of ten blocks, one of them vLLM's null block."""

    num_gpu_blocks = 10
    free = 9

    def get_num_free_blocks(self):
        return self.free


def test_the_pool_is_read_after_each_schedule(monkeypatch):
    moments = iter([1.0, 2.0])
    monkeypatch.setattr("benchmarks.kv_cache_run.time.perf_counter", lambda: next(moments))
    pool = Pool()
    scheduled = [({"a": 64, "b": 1}, {"c"}, 2), ({"a": 1}, None, 6), ({}, None, 9)]

    def schedule():
        tokens, preempted, pool.free = scheduled.pop(0)
        return SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            preempted_req_ids=preempted,
        )

    scheduler = SimpleNamespace(
        schedule=schedule,
        running=["a", "b"],
        kv_cache_manager=SimpleNamespace(block_pool=pool),
    )
    watch = PoolWatch()
    watch.attach(scheduler)
    for _ in range(3):
        scheduler.schedule()
    assert watch.blocks == [7, 3] and watch.running == [2, 2]
    assert watch.prefill_tokens == [64, 0] and watch.preemptions == 1
    assert watch.mean(watch.blocks, end=5.0) == (7 * 1 + 3 * 3) / 4
    assert watch.steps(end=5.0) == ([1], [3])


def test_nothing_runs_until_the_next_request_arrives(monkeypatch):
    moments = iter([3.0])
    monkeypatch.setattr("benchmarks.kv_cache_run.time.perf_counter", lambda: next(moments))
    watch = PoolWatch(seconds=[1.0], running=[2], blocks=[6], prefill_tokens=[64])
    watch.nobody()
    assert watch.steps(end=5.0) == ([2], [])
    assert watch.mean(watch.blocks, end=5.0) == 3


def test_requests_are_the_same_for_every_variant():
    load = Load(4, 16, 2, request_rate=None, seed=3)
    assert load.prompts() == Load(4, 16, 2, None, 3).prompts()
    assert load.prompts() != Load(4, 16, 2, None, 4).prompts()
    assert load.arrivals() == [0.0] * 4
    spread = Load(500, 16, 2, request_rate=2.0, seed=3).arrivals()
    assert spread[0] == 0 and spread == sorted(spread)
    assert spread[-1] / 499 == pytest.approx(0.5, rel=0.15)


def test_a_refusal_is_short():
    plain = NotImplementedError("FP8 KV cache on CPU requires x86 with AVX-512 or AMX.")
    assert short_reason(plain) == "FP8 KV cache on CPU requires x86 with AVX-512 or AMX"
    wordy = ValueError("1 validation error\n  Value error, no fp8 here. [type=value_error]\n more")
    assert short_reason(wordy) == "no fp8 here"
    assert short_reason(RuntimeError()) == "RuntimeError"


@pytest.mark.parametrize("name", list(SHAPES))
def test_shapes_are_written_and_cut(name, tmp_path):
    words = write_shape(tmp_path, SHAPES[name], 1, 40000)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["num_hidden_layers"] == 1 and config["max_position_embeddings"] == 40000
    assert words.startswith(f"1 of {SHAPES[name]['num_hidden_layers']} layers")
    assert in_words(SHAPES[name]).startswith(f"{SHAPES[name]['num_hidden_layers']} layers")
    with pytest.raises(ValueError, match="--layers 99"):
        write_shape(tmp_path, SHAPES[name], 99, 0)


def arguments(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["benchmark_kv_cache.py", *given])
    return benchmark_kv_cache.parse_args()


def test_every_variant_has_the_same_bytes_of_pool(monkeypatch):
    args = arguments(monkeypatch, "--dtype", "bfloat16", "--ratios", "1", "0.25", "--with-idle")
    variants = benchmark_kv_cache.plugin_settings(args)
    assert list(variants) == ["stock", "fp8 cache", "idle", "keep 1", "keep 0.25"]
    blocks = {
        name: benchmark_kv_cache.engine_arguments(args, "", name, settings)[
            "num_gpu_blocks_override"
        ]
        for name, settings in variants.items()
    }
    assert blocks.pop("fp8 cache") == 2 * 4 * 68 + 1  # 2,176 tokens in blocks of 32
    assert set(blocks.values()) == {4 * 68 + 1}
    assert variants["idle"]["min_prompt_tokens"] > args.prompt_tokens
    shape = {**SHAPES["llama-3.2-1b"], "num_hidden_layers": 2}
    assert benchmark_kv_cache.pool_bytes(args, shape) == 4 * 2176 * 2 * 2 * 8 * 64 * 2


def test_a_real_model_keeps_its_layers(monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["attention"]))
    with pytest.raises(SystemExit):
        arguments(monkeypatch, "--model", str(tmp_path), "--layers", "1")
    args = arguments(monkeypatch, "--model", str(tmp_path))
    model, about, _ = benchmark_kv_cache.prepare_model(args, tmp_path / "unused")
    assert model == str(tmp_path) and about.startswith(tmp_path.name)
    assert "load_format" not in benchmark_kv_cache.engine_arguments(args, model, "stock", None)


def test_figures_and_plot_are_saved(monkeypatch, tmp_path, capsys):
    args = Namespace(
        output_dir=tmp_path / "new", ratios=[0.25], requests=8, request_rate=None, profile=True,
        prompt_tokens=256, output_tokens=16, block_size=32, pool_prompts=4.0, dtype="float32",
        max_num_batched_tokens=512, scorer=None, budget=None, prefill_budget=None,
        decode_budget=None, rounds=1,
    )  # fmt: skip
    results = {
        "stock": [run()],
        "fp8 cache": [{"refused": "no"}],
        "keep 0.25": [run(5.0, compressed=8, freed=24)],
    }
    monkeypatch.setattr(benchmark_kv_cache, "versions", lambda: "vLLM 0.0")
    found = benchmark_kv_cache.report(args, "a shape", results)
    benchmark_kv_cache.save(args, found)
    printed = capsys.readouterr().out
    assert "throughput would be 2.50 times stock's" in printed and "vLLM 0.0" in printed
    saved = json.loads((args.output_dir / "kv_cache.json").read_text())
    assert saved["rows"]["keep 0.25"]["tokens_per_second_to_stock"] == 2
    assert saved["runs"]["keep 0.25"][0]["series"]["blocks"] == [40, 20]
    assert (args.output_dir / "kv_cache.png").stat().st_size > 5000


def test_memory_over_time_is_averaged_over_equal_spans():
    series = {"seconds": [0.0, 1.0, 5.0], "running": [1] * 3, "blocks": [10, 30, 0]}
    middles, held = binned(run(6.0, block_bytes=2, series=series), 2.0)
    assert middles == [1, 3, 5]
    assert held == pytest.approx([40, 60, 30])


def test_a_plot_needs_no_compressed_variant(tmp_path):
    results = {"stock": [run()]}
    draw(tmp_path / "stock.png", results, summarise(results), {})
    assert (tmp_path / "stock.png").exists()
