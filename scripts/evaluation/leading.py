"""Lead a model through given answers in a fresh engine, each request with a decode budget."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_kvzip.evaluation.engines import counter, start_engine
from vllm_kvzip.planning.request_options import DECODE_BUDGET

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_kvzip.evaluation.quality.lessons import Lesson


@dataclass
class Follower:
    """A request that is led.

    Attributes:
        prompt: token ids.
        lesson: what it generates, and what is recorded of it.
        budget: its decode budget, tokens; None without compression.
        temperature: at which it samples where the lesson leaves the tokens to the model.
        seed: of the sampling.
        most_blocks: the most KV blocks that it held; set by :func:`lead`.
    """

    prompt: list[int]
    lesson: Lesson
    budget: int | None = None
    temperature: float = 0.0
    seed: int = 0
    most_blocks: int = 0


def lead(model: str, settings: dict[str, Any] | None, followers: Sequence[Follower]) -> float:
    """Let requests follow their lessons, all of them side by side.

    Args:
        model: its folder.
        settings: the plugin's, without a decode budget; None without compression.
        followers: the requests.

    Returns:
        seconds of all rounds / seconds in which requests ran.

    Raises:
        RuntimeError: if there were fewer rounds than requests with a budget.
    """
    from vllm_kvzip.evaluation.quality.teacher_forcing import TeacherForcing, forget, give
    from vllm_kvzip.vllm_bridge.symbols import SamplingParams

    lengths = [len(one.lesson.tokens or ()) or one.lesson.length for one in followers]
    budgets = [one.budget for one in followers if one.budget is not None]
    if settings is not None:
        settings = {**settings, "decode_budget": max(budgets)}
    llm = start_engine(
        model,
        settings,
        max_model_len=max(
            len(one.prompt) + length + 1 for one, length in zip(followers, lengths, strict=True)
        ),
        max_num_seqs=len(followers),
        logits_processors=[TeacherForcing],
        async_scheduling=False,
    )
    engine = llm.llm_engine
    for number, (one, length) in enumerate(zip(followers, lengths, strict=True)):
        budget = {} if one.budget is None else {DECODE_BUDGET: one.budget}
        sampling = SamplingParams(
            temperature=one.temperature,
            seed=one.seed,
            max_tokens=length,
            ignore_eos=True,
            detokenize=False,
            extra_args=give(one.lesson) | budget,
        )
        engine.add_request(str(number), {"prompt_token_ids": one.prompt}, sampling)
    scheduler = engine.engine_core.engine_core.scheduler
    (rows,) = [m.req_to_blocks for m in scheduler.kv_cache_manager.coordinator.single_type_managers]
    rounds, seconds, begin = counter("decode_rounds_total"), round_seconds(), time.perf_counter()
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                lesson = followers[int(output.request_id)].lesson
                lesson.output = list(output.outputs[0].token_ids)
        for name, row in rows.items():
            one = followers[int(name.partition("-")[0])]  # vLLM adds a suffix of its own
            one.most_blocks = max(one.most_blocks, sum(not block.is_null for block in row))
    share = (round_seconds() - seconds) / (time.perf_counter() - begin)
    forget()
    engine.engine_core.shutdown()
    del llm, engine, scheduler, rows
    gc.collect()
    if counter("decode_rounds_total") - rounds < len(budgets):
        raise RuntimeError(f"with budgets of {budgets} tokens not every answer had a round")
    return share


def round_seconds() -> float:
    """What all rounds of this process's engines took."""
    stages = ("score", "select", "compact", "quantize")
    return sum(counter("compress_seconds_sum", stage=stage) for stage in stages)
