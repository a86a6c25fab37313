"""What a worker does in a decode step beside the model's forward pass.

Real engines in this process with the tiny model: stock vLLM, and the plugin with every prompt
compressed. They take turns step by step. What is timed is all that the worker does with the
scheduler's message, sampling included; the model's forward pass is taken out. On a CPU an operator
has run when it returns, so the clock needs no synchronisation.
"""

from __future__ import annotations

import numpy as np

from benchmarks.scheduler_steps import KEEP_RATIO, MODEL, WARM_UP
from benchmarks.step_profile import StepClock
from vllm_kvzip.evaluation.engines import BLOCK_SIZE, start_engine

FIRST_TOKEN, LAST_TOKEN = 5, 200  # of made-up prompts
STEP_TOKENS = 8192


class WorkerSteps:
    """An engine whose requests decode.

    Args:
        num_requests: how many run.
        prompt_tokens: of each of them.
        num_steps: that will be timed.
        compress: with the plugin.
    """

    def __init__(
        self, num_requests: int, prompt_tokens: int, num_steps: int, *, compress: bool
    ) -> None:
        from vllm import SamplingParams

        settings = {"keep_ratio": KEEP_RATIO, "min_prompt_tokens": 0}
        prefill = num_requests * prompt_tokens // STEP_TOKENS  # the first requests decode meanwhile
        longest = prompt_tokens + 2 * (prefill + num_steps + WARM_UP)
        self._engine = start_engine(
            str(MODEL),
            settings if compress else None,
            skip_tokenizer_init=True,
            max_model_len=longest,
            max_num_seqs=num_requests,
            max_num_batched_tokens=max(STEP_TOKENS, num_requests),
            num_gpu_blocks_override=num_requests * (2 * prompt_tokens + longest) // BLOCK_SIZE + 64,
            async_scheduling=False,
        ).llm_engine
        core = self._engine.engine_core.engine_core
        self.worker = core.model_executor.driver_worker.worker
        self._clock = StepClock()
        for name in ("execute_model", "sample_tokens"):
            self._clock.time(self.worker, name, "worker")
        self._clock.time(self.worker.model_runner, "_model_forward", "model")
        rng = np.random.default_rng(0)
        sampling = SamplingParams(
            temperature=0, max_tokens=longest - prompt_tokens, ignore_eos=True, detokenize=False
        )
        for number in range(num_requests):
            prompt = rng.integers(FIRST_TOKEN, LAST_TOKEN, prompt_tokens).tolist()
            self._engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling.clone())
        running = core.scheduler.running
        while len(running) < num_requests or any(
            request.num_computed_tokens < prompt_tokens for request in running
        ):
            self._engine.step()
        for _ in range(WARM_UP):
            self._engine.step()

    @property
    def num_compressed(self) -> int:
        """Running requests whose prefix is compressed."""
        runtime = getattr(self.worker, "_kvzip", None)
        return 0 if runtime is None else len(runtime.prefixes.states)

    def step(self) -> float:
        """One step of the engine; returns the worker's seconds without the forward pass."""
        self._clock.clear()
        self._engine.step()
        return self._clock.seconds["worker"]
