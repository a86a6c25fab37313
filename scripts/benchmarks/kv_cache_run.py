"""One engine under load, stepped by hand in this process, so that every figure is exact.

After each decision of the scheduler the pool is read: how many requests run, how many blocks they
hold. First tokens and preemptions are seen when they happen. A client of ``vllm serve`` (such as
``vllm bench serve``) would see latencies only, through a server's queue, and would share two cores
with it; the numbers of blocks would come from polling.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.kv_cache_shapes import FIRST_TOKEN, LAST_TOKEN
from benchmarks.step_profile import StepClock, profile_engine
from vllm_kvzip.evaluation.engines import counter

WARM_UP_PROMPTS = 2
STAGES = ("score", "select", "compact")


@dataclass
class Load:
    """What every variant is asked.

    Attributes:
        requests: how many.
        prompt_tokens, output_tokens: of each.
        request_rate: arrivals per second, Poisson; None: all at once.
        seed: of prompts and arrivals.
    """

    requests: int
    prompt_tokens: int
    output_tokens: int
    request_rate: float | None
    seed: int

    def prompts(self) -> list[list[int]]:
        """Random tokens; the warm-up's prompts come first."""
        rng = np.random.default_rng(self.seed)
        shape = (WARM_UP_PROMPTS + self.requests, self.prompt_tokens)
        found: list[list[int]] = rng.integers(FIRST_TOKEN, LAST_TOKEN, shape).tolist()
        return found

    def arrivals(self) -> list[float]:
        """Seconds after the start at which each request arrives."""
        if self.request_rate is None:
            return [0.0] * self.requests
        gaps = np.random.default_rng(self.seed).exponential(1 / self.request_rate, self.requests)
        found: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return found


@dataclass
class PoolWatch:
    """Reads an engine's block pool after each decision of its scheduler.

    Attributes:
        seconds: clock of each reading.
        running: requests that run, in prefill or decode.
        blocks: KV cache blocks that somebody holds.
        prefill_tokens: prompt tokens, or recomputed ones, in the step.
        preemptions: how often a request lost its blocks.
    """

    seconds: list[float] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    prefill_tokens: list[int] = field(default_factory=list)
    preemptions: int = 0

    def attach(self, scheduler: Any) -> None:
        """Read after each ``schedule()`` of ``scheduler``."""
        pool = scheduler.kv_cache_manager.block_pool
        original = scheduler.schedule

        def schedule(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self.seconds.append(time.perf_counter())
                self.running.append(len(scheduler.running))
                # One block is the null block, which is never free.
                self.blocks.append(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
                counts = output.num_scheduled_tokens.values()
                self.prefill_tokens.append(sum(count for count in counts if count > 1))
                self.preemptions += len(output.preempted_req_ids or ())
            return output

        scheduler.schedule = schedule

    def clear(self) -> None:
        """Forget all readings; stay attached."""
        for values in (self.seconds, self.running, self.blocks, self.prefill_tokens):
            values.clear()
        self.preemptions = 0

    def mean(self, values: list[int], end: float) -> float:
        """Mean over time, each reading lasting until the next one or ``end``."""
        lengths = np.diff([*self.seconds, end])
        return float(np.average(values, weights=lengths))

    def nobody(self) -> None:
        """From now on nothing runs, until the next reading."""
        self.seconds.append(time.perf_counter())
        for values in (self.running, self.blocks, self.prefill_tokens):
            values.append(0)

    def steps(self, end: float) -> tuple[list[float], list[float]]:
        """Seconds of the steps that read prompts, and of those that only decode."""
        reading: list[float] = []
        decoding: list[float] = []
        lengths = np.diff([*self.seconds, end]).tolist()
        for length, running, tokens in zip(lengths, self.running, self.prefill_tokens, strict=True):
            if running:
                (reading if tokens else decoding).append(length)
        return reading, decoding


@dataclass
class Timeline:
    """When each request arrived, and when its first and its last token came; clock seconds."""

    arrived: dict[str, float] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)


def run_variant(job: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, warm it up, put the load on it.

    Args:
        job: ``load`` (fields of :class:`Load`), ``engine`` (arguments of ``LLM``), ``profile``.

    Returns:
        raw figures, see :mod:`kv_cache_report`; or ``{"refused": reason}`` when vLLM does not
        start with a KV cache dtype that was asked for.
    """
    from vllm import LLM

    try:
        llm = LLM(**job["engine"])
    except Exception as error:
        if "kv_cache_dtype" not in job["engine"]:
            raise
        return {"refused": short_reason(error)}
    engine, load = llm.llm_engine, Load(**job["load"])
    core = engine.engine_core.engine_core
    watch = PoolWatch()
    watch.attach(core.scheduler)
    clock = profile_engine(engine) if job["profile"] else StepClock()
    prompts = load.prompts()
    warm_up(engine, prompts[:WARM_UP_PROMPTS])
    watch.clear()
    clock.clear()
    before = plugin_counters()
    begin = time.perf_counter()
    timeline = serve(engine, load, prompts[WARM_UP_PROMPTS:], begin, watch)
    end = time.perf_counter()
    prefill_steps, decode_steps = watch.steps(end)
    group = core.scheduler.kv_cache_config.kv_cache_groups[0]
    block_bytes = group.kv_cache_spec.page_size_bytes * len(group.layer_names)
    return {
        "total_seconds": end - begin,
        "ttft_seconds": [timeline.first[key] - timeline.arrived[key] for key in timeline.first],
        "tpot_seconds": [
            (timeline.last[key] - timeline.first[key]) / max(1, timeline.tokens[key] - 1)
            for key in timeline.first
        ],
        "output_tokens": sum(timeline.tokens.values()),
        "running_peak": max(watch.running),
        "running_mean": watch.mean(watch.running, end),
        "preemptions": watch.preemptions,
        "block_bytes": block_bytes,
        "pool_blocks": core.scheduler.kv_cache_manager.block_pool.num_gpu_blocks - 1,
        "blocks_peak": max(watch.blocks),
        "blocks_mean": watch.mean(watch.blocks, end),
        "plugin": {key: value - before[key] for key, value in plugin_counters().items()},
        "steps": len(prefill_steps) + len(decode_steps),
        "prefill_steps": len(prefill_steps),
        "prefill_steps_seconds": sum(prefill_steps),
        "decode_step_seconds": float(np.median(decode_steps)) if decode_steps else 0.0,
        "profile": dict(clock.seconds) if job["profile"] else None,
        "series": {
            "seconds": [round(moment - begin, 4) for moment in watch.seconds],
            "running": watch.running,
            "blocks": watch.blocks,
        },
    }


def warm_up(engine: Any, prompts: list[list[int]]) -> None:
    """Let the engine do everything once, compression and decoding of what is left included."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, detokenize=False)
    for prompt in prompts:
        engine.add_request("warm-up", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            engine.step()


def serve(
    engine: Any, load: Load, prompts: list[list[int]], begin: float, watch: PoolWatch
) -> Timeline:
    """Send every request at its time, step until all are answered."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0, max_tokens=load.output_tokens, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    timeline, coming = Timeline(), list(enumerate(load.arrivals()))
    while coming or engine.has_unfinished_requests():
        while coming and begin + coming[0][1] <= time.perf_counter():
            number, arrives = coming.pop(0)
            key = str(number)
            engine.add_request(key, {"prompt_token_ids": prompts[number]}, params.clone())
            timeline.arrived[key], timeline.tokens[key] = begin + arrives, 0
        if not engine.has_unfinished_requests():
            watch.nobody()
            time.sleep(max(0.0, begin + coming[0][1] - time.perf_counter()))
            continue
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            if count := len(output.outputs[0].token_ids):
                key = output.request_id
                timeline.first.setdefault(key, now)
                timeline.last[key] = now
                timeline.tokens[key] += count
    return timeline


def plugin_counters() -> dict[str, float]:
    """The plugin's counters in this process; all zero for stock vLLM."""
    return {
        "requests_compressed": counter("requests_compressed_total"),
        "blocks_freed": counter("blocks_freed_total"),
        "tokens_evicted": counter("tokens_evicted_total"),
        "compressions": counter("compress_seconds_count", stage="score"),
        "compress_seconds": sum(counter("compress_seconds_sum", stage=s) for s in STAGES),
    }


def short_reason(error: BaseException) -> str:
    """What an engine says when it does not start, in a few words."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines.append(type(error).__name__)  # some errors say nothing
    saying = next((line for line in lines if line.startswith("Value error")), lines[0])
    return saying.removeprefix("Value error,").split(" [type=")[0].strip().rstrip(".")[:100]
