"""Requests for models whose layers differ, and what must hold for each of them."""

from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np
from engine_job import MODEL, Report, Request, run_job
from random_model import KINDS, make_random_model

BLOCK = 32
REPEATS = {"scorer": "kvzip", "repeat_prompt": "repeat", "profile": "none"}
CONTEXT, LONG, OUTPUT = 400, 700, 40


def tokens(rng, count):
    return rng.integers(3, 500, count).tolist()


def load():
    """Prompts that share a declared context, that repeat themselves, and a short one."""
    rng = np.random.default_rng(5)
    context, prompt = tokens(rng, CONTEXT), tokens(rng, 390)
    question = tokens(rng, 150)
    declared = {"extra_args": {"kvzip_context_tokens": CONTEXT}}
    return [
        Request(prompt, 24),
        Request(tokens(rng, 30), 24),
        Request(context + tokens(rng, 40), 24, options=declared),
        Request(tokens(rng, LONG), OUTPUT),
        Request(context + tokens(rng, 50), 24, arrives=40, options=declared),
        Request(context + question, 24, arrives=44, options=declared),
        Request(prompt, 24, arrives=70),
        Request(tokens(rng, 500), 24, arrives=71, aborts=74),
        Request(context + question, 24, arrives=76, options=declared),
    ]


@dataclass
class MixedRuns:
    """The same requests on one model.

    Attributes:
        model: its folder.
        engine: arguments of its engines.
        stock, whole, quarter: of stock vLLM, at keep ratio 1.0, and at 0.25.
    """

    model: Path
    engine: dict
    stock: Report
    whole: Report
    quarter: Report


def run_mixed(kind: str, folder: Path, repeats: bool = False) -> MixedRuns:
    """Run the load on a random model of one kind; whether it repeats contexts at ratio 1.0."""
    model = make_random_model(kind, folder)
    engine = {
        "tokenizer": str(MODEL), "model": model, "max_num_batched_tokens": 256,
        "num_gpu_blocks_override": 240, **KINDS[kind].engine,
    }  # fmt: skip
    scorers = {1.0: REPEATS if repeats else {"scorer": "random"}, 0.25: {"scorer": "random"}}
    return MixedRuns(
        model,
        engine,
        run_job(load(), **engine),
        *(
            run_job(
                load(),
                kvzip={"keep_ratio": ratio, "min_prompt_tokens": 64, **scorer},
                watch_hashed_blocks=True,
                **engine,
            )
            for ratio, scorer in scorers.items()
        ),
    )


def check_identity(runs: MixedRuns) -> None:
    """At keep ratio 1.0 every token is stock vLLM's; and tokens depend on their contexts."""
    for request, got, wanted in zip(load(), runs.whole.outputs, runs.stock.outputs, strict=True):
        assert got == (wanted if request.aborts is None else wanted[: len(got)])
    assert runs.whole.metrics["vllm_kvzip_requests_compressed_total"] >= 3
    assert runs.whole.classes["manager"] == "HeadPageManager"
    assert runs.whole.classes["backend"] == "HeadPageCPUBackend"
    assert len({tuple(output) for output in runs.stock.outputs}) >= 7
    assert runs.quarter.outputs != runs.stock.outputs


def check_pool(runs: MixedRuns) -> None:
    """Every block of every group is back, and no block of the prefix cache was written to."""
    for report in (runs.stock, runs.whole, runs.quarter):
        assert report.free_blocks[-1] == report.free_blocks[0] == runs.stock.free_blocks[0]
        assert report.written_hashed_blocks == []


def check_freed(runs: MixedRuns) -> None:
    """While the long prompt is answered its row holds a quarter of its blocks, and the tail."""
    prefix = LONG // BLOCK
    held = [row["3"] for row in runs.quarter.held_blocks if "3" in row][-8:]
    tails = {ceil(count / BLOCK) - prefix for count in range(LONG + OUTPUT - 9, LONG + OUTPUT)}
    assert set(held) == {ceil(prefix / 4) + tail for tail in tails}
    assert runs.quarter.metrics["vllm_kvzip_blocks_freed_total"] > 30


def check_reuse(runs: MixedRuns, block: int = BLOCK) -> None:
    """A compressed prefix is found again, and what was computed over it as well."""
    for report in (runs.whole, runs.quarter):
        context = CONTEXT // block * block
        assert report.cached_tokens[4:6] == [context, context]
        assert report.cached_tokens[8] == (CONTEXT + 149) // block * block
        assert report.outputs[8] == report.outputs[5]
        assert report.metrics["vllm_kvzip_prefix_hits_total"] >= 4
        assert min(report.compared_hashed_blocks.values()) > 50
