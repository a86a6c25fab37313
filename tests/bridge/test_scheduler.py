"""vLLM's scheduler with our additions, over blocks that hold nothing."""

from pathlib import Path

import pytest
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

pytestmark = pytest.mark.vllm

MODEL = Path(__file__).parent.parent / "models" / "tiny-retriever"
BLOCK = 32
SHAPE = {"block_size": BLOCK, "num_kv_heads": 4, "head_size": 32, "dtype": torch.float32}


def build_scheduler(num_blocks, window=None, kvzip=None, **engine):
    """The scheduler that vLLM would make for an engine of this plugin."""
    config = EngineArgs(
        model=str(MODEL), max_model_len=256, max_num_seqs=8, block_size=BLOCK,
        additional_config={"kvzip": {"keep_ratio": 0.5, **(kvzip or {})}}, **engine,
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


def request(name, length, priority=0):
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(max_tokens=9, ignore_eos=True)
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


def test_what_a_preempted_request_did_not_compute_is_not_found():
    scheduler = build_scheduler(
        num_blocks=9,
        scheduling_policy="priority",
        async_scheduling=False,
        max_num_batched_tokens=96,
        long_prefill_token_threshold=64,
    )
    unimportant = request("a", 224, priority=5)
    scheduler.add_request(unimportant)
    assert step(scheduler) == {"a": 96}
    scheduler.add_request(request("b", 32))
    assert step(scheduler) == {"a": 64, "b": 32}
    # "a" is scheduled first and takes the last blocks; "b" then needs one, and "a" has to go.
    assert step(scheduler) == {"b": 1}
    assert unimportant.num_preemptions == 1
    _, found, *_ = scheduler.kv_cache_manager.get_computed_blocks(unimportant)
    assert found == 160


@pytest.mark.parametrize(("scorer", "is_kept"), [("kvzip", True), ("keydiff", False)])
def test_a_window_keeps_the_end_of_a_context_that_is_to_be_repeated(scorer, is_kept):
    scheduler = build_scheduler(
        64,
        window=34,
        kvzip={"scorer": scorer, "min_prompt_tokens": 64},
        async_scheduling=False,
        max_num_batched_tokens=256,
        long_prefill_token_threshold=65,
    )
    scheduler.add_request(request("b", 32))
    scheduler.add_request(request("a", 223))
    blocks = scheduler.kv_cache_manager.coordinator.single_type_managers[1].req_to_blocks["a"]
    assert [step(scheduler)["a"] for _ in range(3)] == [65] * 3
    # What comes after token 191 sees tokens from 159 on, and the next step those from 162 on.
    assert step(scheduler) == {"a": 28, "b": 1}
    assert [not block.is_null for block in blocks] == [False] * 4 + [is_kept, True, True]
    step(scheduler)  # the context is repeated before this step
    assert [not block.is_null for block in blocks] == [False] * 5 + [True] * 2
