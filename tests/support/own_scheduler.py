"""vLLM's scheduler as an engine of this plugin would have it, over blocks that hold nothing."""

from collections import deque
from pathlib import Path

import torch
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
from vllm_kvzip.vllm_bridge.settings import Settings

MODEL = Path(__file__).parent.parent / "models" / "tiny-retriever"
BLOCK = 32
SHAPE = {"block_size": BLOCK, "num_kv_heads": 4, "head_size": 32, "dtype": torch.float32}


def build_scheduler(num_blocks, window=None, kvzip=None, **engine):
    """The scheduler that vLLM would make for an engine of this plugin."""
    config = EngineArgs(
        model=str(MODEL), max_num_seqs=8, block_size=BLOCK,
        additional_config={"kvzip": {"keep_ratio": 0.5, **(kvzip or {})}},
        **{"max_model_len": 256, **engine},
    ).create_engine_config()  # fmt: skip
    config.cache_config.num_gpu_blocks = num_blocks
    spec = HeadPageSpec.from_full_attention(
        FullAttentionSpec(**SHAPE), Settings.from_vllm_config(config), vllm_config=config
    )
    groups = [KVCacheGroupSpec(["layer"], spec)]
    if window is not None:
        narrow = SlidingWindowSpec(**SHAPE, sliding_window=window)
        groups.append(KVCacheGroupSpec(["narrow layer"], narrow))
    init_none_hash(sha256)
    return config.scheduler_config.get_scheduler_cls()(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
    )


def request(name, length, priority=0, max_tokens=9, **options):
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, extra_args=options)
    tokens = [ord(name[0])] * length
    return Request(name, tokens, params, None, block_hasher=hasher, priority=priority)


def step(scheduler):
    """Returns how many tokens each request was given."""
    output = scheduler.schedule()
    ids = list(output.num_scheduled_tokens)
    places = {name: index for index, name in enumerate(ids)}
    tokens = [[] if scheduler.requests[name].is_prefill_chunk else [7] for name in ids]
    scheduler.update_from_output(output, ModelRunnerOutput(ids, places, tokens))
    return output.num_scheduled_tokens


def live(scheduler, num_steps):
    """Up to so many steps, until every request has ended.

    With asynchronous scheduling a step is scheduled before the last one's output is there.

    Yields:
        how many tokens each request was given in each step.
    """
    under_way = deque()
    for _ in range(num_steps):
        if not scheduler.has_requests() and not under_way:
            return
        output = scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        tokens = [[] if scheduler.requests[name].is_prefill_chunk else [7] for name in ids]
        places = {name: index for index, name in enumerate(ids)}
        under_way.append((output, ModelRunnerOutput(ids, places, tokens)))
        while len(under_way) > scheduler.scheduler_config.async_scheduling or (
            under_way and not output.num_scheduled_tokens
        ):
            scheduler.update_from_output(*under_way.popleft())
        yield output.num_scheduled_tokens
