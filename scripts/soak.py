"""Put a random load on a compressing engine and check it after every step.

A seeded mix of what clients do: prompts of all lengths, shared documents with and without a
declared context, keep ratios of their own or none, several samples, bursts, aborts at any moment,
resets of the prefix cache, in a pool that is too small for all of it. After each step every block
must have the owners it says, every request must hold what the formula says, and no byte of a
cached block may have changed. Requests that opted out are asked again at the end, alone: their
answers must not depend on what happened around them.

Stops at the first thing that does not add up, and says how to see it again.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_invariants import BrokenInvariantError, EngineInvariants
from hashed_blocks import HashedBlockWatch
from local_server import CPU_ENVIRONMENT
from tqdm import tqdm

DEFAULT_MODEL = Path(__file__).parent.parent / "tests" / "models" / "tiny-retriever"
BLOCK_SIZE, KEEP_RATIO, MAX_MODEL_LEN = 32, 0.4, 1024
MOST_OPEN = 24  # requests at a time
ASKED_AGAIN = 25
MUST_HAPPEN = (
    "raw row", "crossing row", "compressed row", "row on a shared prefix", "shared block",
    "raw comparisons", "compressed comparisons", "preemption", "abort", "several samples",
)  # fmt: skip


@dataclass
class Asked:
    """One request: its prompt, the parameters it came with, and whether it must be reproduced."""

    prompt: list[int]
    params: Any
    opted_out: bool


@dataclass
class Workload:
    """The clients.

    Args:
        seed: of everything they do.
        vocabulary: token ids are below it.
    """

    seed: int
    vocabulary: int
    random: random.Random = field(init=False)
    documents: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        lengths = (320, 416, 600, 777)
        self.documents = [self._tokens(length) for length in lengths]

    def burst(self) -> int:
        """How many requests arrive before the next step."""
        chance = self.random.random()
        return 0 if chance < 0.75 else 1 if chance < 0.97 else self.random.randint(4, 12)

    def next_request(self) -> Asked:
        """What the next client wants."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        options: dict[str, Any] = {}
        document: list[int] = []
        if self.random.random() < 0.5:
            document = self.random.choice(self.documents)
            if self.random.random() < 0.6:
                options["kvzip_context_tokens"] = len(document) - self.random.choice([0, 0, 40])
            rest = self.random.randint(1, 60)
        else:
            rest = self.random.choice([self.random.randint(1, 250), self.random.randint(250, 900)])
        prompt = [*document, *self._tokens(rest)]
        if self.random.random() < 0.35:
            options["kvzip_keep_ratio"] = self.random.choice([0.15, 0.25, 0.7, 0.95, 1.0])
        opted_out = self.random.random() < 0.12
        if opted_out:
            options["kvzip"] = "off"
        room = MAX_MODEL_LEN - len(prompt)
        num_samples = 1 if opted_out or self.random.random() < 0.9 else 2
        params = SamplingParams(
            temperature=num_samples - 1,
            max_tokens=min(room, self.random.choice([1, 2, 8, 30, 120])),
            n=num_samples,
            ignore_eos=True,
            detokenize=False,
            extra_args=options,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return Asked(prompt, params, opted_out)

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(3, self.vocabulary) for _ in range(count)]


def soak(
    engine: Any, num_requests: int, seed: int, invariants: EngineInvariants
) -> tuple[Counter[str], list[tuple[Asked, list[int]]]]:
    """Serve the load.

    Args:
        engine: vLLM's ``LLMEngine``, in this process.
        num_requests: how many.
        seed: of the workload.
        invariants: checked after every step.

    Returns:
        what happened, and the answers of requests that opted out.

    Raises:
        BrokenInvariantError: see :class:`EngineInvariants`.
    """
    core = engine.engine_core.engine_core
    clients = Workload(seed, engine.vllm_config.model_config.get_vocab_size())
    asked: dict[str, Asked] = {}
    happened: Counter[str] = Counter()
    answers = []
    preemptions: dict[str, int] = {}
    with tqdm(total=num_requests, desc="requests") as bar:
        while bar.n + len(asked) < num_requests or asked:
            for _ in range(clients.burst()):
                if bar.n + len(asked) < num_requests and len(asked) < MOST_OPEN:
                    request = clients.next_request()
                    key = str(bar.n + len(asked))
                    asked[key] = request
                    prompt = {"prompt_token_ids": request.prompt}
                    engine.add_request(key, prompt, request.params.clone())
                    happened["several samples"] += request.params.n > 1
            if asked and clients.random.random() < 0.02:
                victim = clients.random.choice(sorted(asked))
                engine.abort_request([victim])
                del asked[victim]
                bar.update()
                happened["abort"] += 1
            if clients.random.random() < 0.005 and engine.reset_prefix_cache():
                happened["reset"] += 1
            if engine.has_unfinished_requests() or core.scheduler.has_finished_requests():
                for output in engine.step():
                    if output.finished and (request := asked.pop(output.request_id, None)):
                        bar.update()
                        if request.opted_out:
                            answers.append((request, list(output.outputs[0].token_ids)))
            for request in core.scheduler.requests.values():
                happened["preemption"] += request.num_preemptions - preemptions.get(
                    request.request_id, 0
                )
                preemptions[request.request_id] = request.num_preemptions
            invariants.check()
            happened["step"] += 1
    while core.scheduler.has_finished_requests():
        engine.step()
    invariants.check_idle()
    return happened, answers


def differing(engine: Any, answers: list[tuple[Asked, list[int]]]) -> int:
    """How many of these requests answer otherwise when they have the engine to themselves."""
    count = 0
    for number, (request, expected) in enumerate(answers):
        engine.reset_prefix_cache()
        params = request.params.clone()
        engine.add_request(f"again-{number}", {"prompt_token_ids": request.prompt}, params)
        found: list[int] = []
        while engine.has_unfinished_requests():
            for output in engine.step():
                found = list(output.outputs[0].token_ids)
        count += found != expected
    return count


def main() -> int:
    """Returns 1 when something does not add up, 2 when the load was too tame to tell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool-blocks", type=int, default=70)
    parser.add_argument("--prefill-budget", type=int, help="tokens; compress while reading")
    parser.add_argument("--mode", choices=["evict", "mixed"], default="evict")
    parser.add_argument("--scorer", default="keydiff")
    parser.add_argument("--budget", default="adaptive")
    parser.add_argument("--max-num-batched-tokens", type=int, default=384)
    arguments = parser.parse_args()
    # One thread is faster than two for so small a model.
    defaults = {**CPU_ENVIRONMENT, "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.update({**defaults, **os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})

    from vllm import LLM

    settings = {"mode": arguments.mode, "scorer": arguments.scorer, "budget": arguments.budget}
    settings["keep_ratio" if arguments.mode == "evict" else "keep_bytes_ratio"] = KEEP_RATIO
    must_happen, blocks = list(MUST_HAPPEN), None
    if arguments.prefill_budget is not None:
        settings["prefill_budget"] = arguments.prefill_budget
        blocks = arguments.prefill_budget // BLOCK_SIZE
        must_happen.append("round")
    llm = LLM(
        str(arguments.model), dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3,
        block_size=BLOCK_SIZE, num_gpu_blocks_override=arguments.pool_blocks,
        max_model_len=MAX_MODEL_LEN, max_num_seqs=12, skip_tokenizer_init=True,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        additional_config={"kvzip": settings},
    )  # fmt: skip
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    invariants = EngineInvariants(core.scheduler, HashedBlockWatch(core), KEEP_RATIO, 20, blocks)
    try:
        happened, answers = soak(engine, arguments.requests, arguments.seed, invariants)
    except BrokenInvariantError as error:
        print(f"{error}; again: {' '.join(sys.argv)}", file=sys.stderr)
        return 1
    again = answers[:: max(1, len(answers) // ASKED_AGAIN)]
    if num := differing(engine, again):
        print(
            f"{num} of {len(again)} uncompressed requests answer otherwise alone.", file=sys.stderr
        )
        return 1
    happened.update(invariants.seen)
    for name, count in sorted(happened.items()):
        print(f"{count:>10,}  {name}")
    if missing := [name for name in must_happen if not happened[name]]:
        print(f"The load was too tame: no {', no '.join(missing)}.", file=sys.stderr)
        return 2
    print(f"{arguments.requests} requests, {len(again)} of them asked again: all adds up.")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # vLLM's own shutdown is not what is tested, and costs seconds
