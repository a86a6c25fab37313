"""What a step costs vLLM's scheduler when the running requests are compressed.

    python scripts/benchmark_scheduler.py

vLLM's own scheduler over vLLM's own block pool, with the plugin and without it, and no model: every
request gets a made-up token per step. All prompts are prefilled (and compressed) in the first
steps; what is timed are decode steps, scheduling and taking in the output. With and without the
plugin take turns. The cost per request must depend neither on how many
requests run nor on how many blocks their compressed prefixes hold.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvzip.evaluation.engines import BLOCK_SIZE, versions

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.sched.scheduler import Scheduler

MODEL = Path(__file__).parent.parent / "tests" / "models" / "tiny-retriever"
KEEP_RATIO = 0.5
WARM_UP = 5


def build_scheduler(num_requests: int, prompt_tokens: int, *, compress: bool) -> Scheduler:
    """The scheduler vLLM would make, over a pool that holds every request uncompressed and more."""
    additional = {"kvzip": {"keep_ratio": KEEP_RATIO, "min_prompt_tokens": 0}} if compress else {}
    config = EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        max_model_len=2 * prompt_tokens,
        hf_overrides={"max_position_embeddings": 2 * prompt_tokens},
        max_num_seqs=num_requests,
        max_num_batched_tokens=num_requests * prompt_tokens,
        block_size=BLOCK_SIZE,
        async_scheduling=False,
        additional_config=additional,
    ).create_engine_config()
    spec: Any = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=4, head_size=32, dtype=torch.float32
    )
    if compress:
        from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
        from vllm_kvzip.vllm_bridge.settings import Settings

        settings = Settings.from_vllm_config(config)
        spec = HeadPageSpec.from_full_attention(spec, settings, config)
    num_blocks = 2 * num_requests * (-(-prompt_tokens // BLOCK_SIZE) + 8)
    config.cache_config.num_gpu_blocks = num_blocks
    scheduler: Scheduler = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
    )
    return scheduler


def one_step(scheduler: Scheduler, token: int) -> float:
    """Schedule, answer ``token`` for everybody, take it in; returns the scheduler's seconds."""
    start = time.perf_counter()
    output: SchedulerOutput = scheduler.schedule()
    scheduled = time.perf_counter()
    ids = list(output.num_scheduled_tokens)
    answer = ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
        sampled_token_ids=[[token] for _ in ids],
    )
    answered = time.perf_counter()
    scheduler.update_from_output(output, answer)
    return scheduled - start + time.perf_counter() - answered


def time_steps(
    num_requests: int, prompt_tokens: int, num_steps: int, *, compress: bool
) -> tuple[float, int]:
    """Median seconds of a decode step, and how many blocks are held."""
    scheduler = build_scheduler(num_requests, prompt_tokens, compress=compress)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
    sampling = SamplingParams(max_tokens=2 * num_steps + 2 * WARM_UP, ignore_eos=True)
    for number in range(num_requests):
        prompt = [number % 500] * 2 + [number // 500] * (prompt_tokens - 2)
        scheduler.add_request(Request(str(number), prompt, sampling, None, block_hasher=hasher))
    for token in range(WARM_UP):
        one_step(scheduler, token)
    pool = scheduler.kv_cache_manager.block_pool
    held = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
    seconds = [one_step(scheduler, token) for token in range(num_steps)]
    assert len(scheduler.running) == num_requests
    return statistics.median(seconds), held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, nargs="+", default=[16, 256, 4096])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[256, 2048])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(
        "| running | prompt tokens | blocks held, stock | compressed | stock | compressed | ratio |"
    )
    print("|---|---|---|---|---|---|---|")
    for num_requests in args.requests:
        for prompt_tokens in args.prompt_tokens:
            measure = partial(time_steps, num_requests, prompt_tokens, args.steps)
            rounds = [(measure(compress=False), measure(compress=True)) for _ in range(args.rounds)]
            (_, held_stock), (_, held) = rounds[0]
            if held >= held_stock:
                print(f"Nothing was compressed: {held} blocks held, stock {held_stock}.")
                return 1
            stock, ours = (statistics.median(r[i][0] for r in rounds) for i in (0, 1))
            ratio = statistics.median(r[1][0] / r[0][0] for r in rounds)
            each = [f"{1e6 * seconds / num_requests:.1f} us" for seconds in (stock, ours)]
            print(
                f"| {num_requests} | {prompt_tokens} | {held_stock} | {held} | {each[0]} "
                f"| {each[1]} | {ratio:.2f} |",
                flush=True,
            )
    print(
        f"\nMedian time of a decode step of vLLM's scheduler per running request; keep ratio "
        f"{KEEP_RATIO}, blocks of {BLOCK_SIZE} tokens. {versions()}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
