"""vLLM's own scheduler over vLLM's own block pool, and no model.

Every request gets a made-up token per step. Two such schedulers, with the plugin and without it,
take turns step by step, so what slows the machine down slows both down.
"""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvzip.evaluation.engines import BLOCK_SIZE

if TYPE_CHECKING:
    from vllm.v1.core.sched.scheduler import Scheduler

MODEL = Path(__file__).parents[2] / "tests" / "models" / "tiny-retriever"
KEEP_RATIO = 0.5
WARM_UP = 5
TOKEN = 3
CACHED_PROMPT_TOKENS = 4 * BLOCK_SIZE
AT_ONCE = 1024
"""Prompts that fill the prefix cache are prefilled so many at a time."""


class SchedulerSteps:
    """A scheduler with requests that decode.

    Args:
        num_requests: how many run.
        prompt_tokens: of each of them.
        num_cached: how many other prompts are in the prefix cache.
        num_steps: tokens that no request outlives, twice over.
        compress: with the plugin.
    """

    def __init__(
        self,
        num_requests: int,
        prompt_tokens: int,
        num_cached: int,
        num_steps: int,
        *,
        compress: bool,
    ) -> None:
        init_none_hash(sha256)
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._ids = itertools.count()
        self._num_cached = num_cached
        longest = max(prompt_tokens, CACHED_PROMPT_TOKENS) + 2 * num_steps + 2 * WARM_UP
        of_cached = num_cached * 2 * CACHED_PROMPT_TOKENS // BLOCK_SIZE
        of_running = num_requests * (2 * prompt_tokens + longest) // BLOCK_SIZE
        self.scheduler = _build(
            max(num_requests, AT_ONCE), longest, of_cached + of_running + 1024, compress=compress
        )
        self._fill_cache()
        self._endless = SamplingParams(max_tokens=longest, ignore_eos=True)
        for number in range(num_requests):
            self._add([number % 500] * 2 + [number // 500] * (prompt_tokens - 2), self._endless)
        for _ in range(WARM_UP):
            self.step()
        assert len(self.scheduler.running) == num_requests

    @property
    def num_held_blocks(self) -> int:
        """Blocks that requests hold."""
        pool = self.scheduler.kv_cache_manager.block_pool
        return int(pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())

    @property
    def num_compressed_prefixes(self) -> int:
        """Compressed prefixes in the cache."""
        manager = getattr(self.scheduler, "_kvzip_manager", None)
        return 0 if manager is None else len(manager.prefixes)

    def step(self) -> float:
        """Schedule, answer one token for everybody, take it in.

        Returns:
            the scheduler's seconds.
        """
        start = time.perf_counter()
        output = self.scheduler.schedule()
        scheduled = time.perf_counter()
        ids = list(output.num_scheduled_tokens)
        answer = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[[TOKEN] for _ in ids],
        )
        answered = time.perf_counter()
        self.scheduler.update_from_output(output, answer)
        return scheduled - start + time.perf_counter() - answered

    def replace(self, count: int) -> None:
        """The ``count`` oldest requests end; as many cached prompts, the oldest, come again."""
        oldest = [request.request_id for request in self.scheduler.running[:count]]
        self.scheduler.finish_requests(oldest, RequestStatus.FINISHED_ABORTED)
        for _ in range(count):
            self._add(self._cached_prompt(next(self._again)), self._endless)

    def _fill_cache(self) -> None:
        """Prefill the prompts that stay in the prefix cache, and let them end."""
        self._again = itertools.cycle(range(max(1, self._num_cached)))
        brief = SamplingParams(max_tokens=2, ignore_eos=True)
        for first in range(0, self._num_cached, AT_ONCE):
            for number in range(first, min(first + AT_ONCE, self._num_cached)):
                self._add(self._cached_prompt(number), brief)
            while self.scheduler.has_unfinished_requests():
                self.step()

    @staticmethod
    def _cached_prompt(number: int) -> list[int]:
        return [1 + number % 500, 1 + number // 500] * (CACHED_PROMPT_TOKENS // 2) + [7]

    def _add(self, prompt: list[int], sampling: SamplingParams) -> None:
        request = Request(str(next(self._ids)), prompt, sampling, None, block_hasher=self._hasher)
        self.scheduler.add_request(request)


def _build(num_requests: int, longest: int, num_blocks: int, *, compress: bool) -> Scheduler:
    """The scheduler that vLLM would make."""
    additional = {"kvzip": {"keep_ratio": KEEP_RATIO, "min_prompt_tokens": 0}} if compress else {}
    config = EngineArgs(
        model=str(MODEL),
        skip_tokenizer_init=True,
        max_model_len=longest,
        hf_overrides={"max_position_embeddings": longest},
        max_num_seqs=num_requests,
        max_num_batched_tokens=num_requests * longest,
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

        spec = HeadPageSpec.from_full_attention(spec, Settings.from_vllm_config(config), config)
    config.cache_config.num_gpu_blocks = num_blocks
    scheduler: Scheduler = config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK_SIZE,
    )
    return scheduler
