"""Put a random load on a compressing engine and check it after every step.

A seeded mix of what clients do: prompts of all lengths, shared documents with and without a
declared context, keep ratios of their own or none, opt-outs, several samples, priorities, bursts,
aborts at any moment; and of what those do who run the engine: resets of the prefix cache, also
under running requests, and pauses of all kinds; in a pool that is too small for all of it. After
each step every block must have the owners it says, every request must hold what the formula says
in the pages that its worker reads, and no byte of a cached block may have changed. Requests that
opted out are asked again at the end, by themselves: their answers must not depend on what happened
around them. With ``--identity`` the keep ratio is 1.0, and every answer must be that of stock vLLM,
token for token; only requests with a lower keep ratio of their own may differ.

Stops at the first thing that does not add up, and says how to see it again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from soaking.engine_invariants import BrokenInvariantError, EngineInvariants
from soaking.hashed_blocks import HashedBlockWatch
from soaking.held_blocks import HeldBlocks, quantized_tokens
from soaking.run import DISTURBANCES, Soak
from soaking.stock_answers import stock_answers
from soaking.workload import Asked, Workload
from vllm_kvzip.evaluation.local_server import CPU_ENVIRONMENT

DEFAULT_MODEL = Path(__file__).parent.parent / "tests" / "models" / "tiny-retriever"
BLOCK_SIZE, KEEP_RATIO, MAX_MODEL_LEN, PROTECTED_TOKENS = 32, 0.4, 640, 20
ASKED_AGAIN = 25
MUST_HAPPEN = (
    "raw row", "crossing row", "compressed row", "row on a shared prefix", "shared block",
    "page table", "raw comparisons", "compressed comparisons", "several samples", *DISTURBANCES,
)  # fmt: skip


def main() -> int:
    """Returns 1 when something does not add up, 2 when the load was too tame to tell."""
    arguments = _arguments()
    # One thread is faster than two for so small a model.
    defaults = {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.update({**defaults, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})

    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(arguments.model)
    workload = Workload(
        arguments.seed, arguments.requests, model.vocab_size, MAX_MODEL_LEN, arguments.identity
    )
    options: dict[str, Any] = {
        "model": str(arguments.model), "dtype": "float32", "enforce_eager": True,
        "gpu_memory_utilization": 0.3, "block_size": BLOCK_SIZE, "max_model_len": MAX_MODEL_LEN,
        "num_gpu_blocks_override": arguments.pool_blocks, "max_num_seqs": 12,
        "max_num_batched_tokens": arguments.max_num_batched_tokens,
        # Scorer kvzip asks for the context in words.
        "skip_tokenizer_init": arguments.scorer != "kvzip",
        "scheduling_policy": arguments.scheduling_policy, **arguments.engine,
    }  # fmt: skip
    stock = stock_answers(workload.requests, options) if arguments.identity else None

    from vllm import LLM

    options["additional_config"] = {"kvzip": _settings(arguments)}
    engine = LLM(**options).llm_engine
    core = engine.engine_core.engine_core
    worker = core.model_executor.driver_worker.worker._kvzip
    formula = _formula(arguments, worker)
    invariants = EngineInvariants(core.scheduler, HashedBlockWatch(core), formula, worker)
    soak = Soak(engine, workload, invariants)
    try:
        soak.run()
    except BrokenInvariantError as error:
        return _failed(f"{error}", arguments)
    if stock is None:
        numbers = [n for n in soak.answers if workload.requests[n].opted_out][:ASKED_AGAIN]
        answers, expected = soak.ask_again(numbers), soak.answers
        checked = f"{len(numbers)} of them asked again"
    else:
        numbers = [n for n in soak.answers if _keeps_everything(workload.requests[n])]
        answers = {number: soak.answers[number] for number in numbers}
        expected = {n: [stock[n]] * workload.requests[n].num_samples for n in numbers}
        checked = f"{len(numbers)} of them compared with stock vLLM"
        disturbed = soak.disturbed.intersection(numbers)
        soak.happened["request that lost its blocks, compared"] += len(disturbed)
    for number in numbers:
        if message := _difference(answers[number], expected[number]):
            return _failed(f"Request {number} is answered otherwise, {message}", arguments)
    happened = soak.happened + invariants.seen
    for name, count in sorted(happened.items()):
        print(f"{count:>10,}  {name}")
    must_happen = [*MUST_HAPPEN, *(["round"] if arguments.prefill_budget else [])]
    if stock is not None:
        must_happen.append("request that lost its blocks, compared")
    if missing := [name for name in must_happen if not happened[name]]:
        print(f"The load was too tame: no {', no '.join(missing)}.", file=sys.stderr)
        return 2
    print(f"{arguments.requests} requests, {checked}: all adds up.")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool-blocks", type=int, help="default: few")
    parser.add_argument("--prefill-budget", type=int, help="tokens; compress while reading")
    parser.add_argument("--mode", choices=["evict", "quantize", "mixed"], default="evict")
    parser.add_argument("--format", choices=["nf4", "int4", "int8"], help="of quantized pages")
    parser.add_argument("--scorer", default="keydiff")
    parser.add_argument("--budget", default="adaptive")
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--scheduling-policy", choices=["fcfs", "priority"], default="fcfs")
    parser.add_argument(
        "--engine", type=json.loads, default={}, help="more arguments of vLLM's LLM, as JSON"
    )
    parser.add_argument(
        "--identity", action="store_true", help="keep ratio 1.0; compare with stock vLLM"
    )
    arguments = parser.parse_args()
    if arguments.identity and (arguments.mode != "evict" or arguments.prefill_budget):
        parser.error("--identity: only mode evict without a prefill budget keeps everything as is")
    if arguments.format and arguments.mode == "evict":
        parser.error("--format has no effect in mode evict")
    if arguments.pool_blocks is None:  # vLLM wants room for the longest prompt, before and after
        arguments.pool_blocks = 46 if arguments.identity else 32
    return arguments


def _keep_ratio(arguments: argparse.Namespace) -> float:
    return 1.0 if arguments.identity else KEEP_RATIO


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The plugin's."""
    by = "keep_bytes_ratio" if arguments.mode == "mixed" else "keep_ratio"
    settings = {
        "mode": arguments.mode, "scorer": arguments.scorer, "budget": arguments.budget,
        by: _keep_ratio(arguments),
    }  # fmt: skip
    if arguments.format:
        settings["key_format"] = settings["value_format"] = arguments.format
    if arguments.prefill_budget is not None:
        settings["prefill_budget"] = arguments.prefill_budget
    return settings


def _formula(arguments: argparse.Namespace, worker: Any) -> HeldBlocks:
    """What requests must hold under these settings, in the cache of that worker."""
    quantized, budget = 0, arguments.prefill_budget
    if arguments.mode == "quantize":
        page = worker.cache.pages[0]
        head_dim = worker.cache.geometry.head_dim
        quantized = quantized_tokens(arguments.format or "nf4", page.nbytes, head_dim)
    return HeldBlocks(
        _keep_ratio(arguments),
        PROTECTED_TOKENS,
        BLOCK_SIZE,
        arguments.mode,
        quantized,
        None if budget is None else budget // BLOCK_SIZE,
    )


def _keeps_everything(request: Asked) -> bool:
    """Whether it must be answered as by stock vLLM where the keep ratio is 1.0."""
    return request.opted_out or request.options.get("kvzip_keep_ratio", 1.0) == 1.0


def _difference(found: list[list[int]], expected: list[list[int]]) -> str | None:
    """Where two answers differ, samples and all; None if they do not."""
    for number, (sample, other) in enumerate(zip(found, expected, strict=True)):
        for place, (token, right) in enumerate(zip(sample, other, strict=True)):
            if token != right:
                return f"from token {place} of {len(sample)} of sample {number} on"
    return None


def _failed(message: str, arguments: argparse.Namespace) -> int:
    print(f"{message}; again: {shlex.join(sys.argv)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # vLLM's own shutdown is not what is tested, and costs seconds
