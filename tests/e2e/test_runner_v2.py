"""Model runner V2, vLLM's choice on CUDA, does what runner V1 does; run in Triton's interpreter.

Prefix hits, chunked prefill, preemption, aborts and asynchronous scheduling, in a pool that is too
small for the load.
"""

import numpy as np
import pytest
from engine_job import RUNNER_V2, Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import make_context

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ENGINE = {"max_num_batched_tokens": 256, "max_model_len": 736, "num_gpu_blocks_override": 48}
SETTINGS = {"min_prompt_tokens": 64, "scorer": "keydiff"}


def requests():
    """Six prompts for a pool of 48 blocks, three that find prefixes, twelve that outgrow it."""
    rng = np.random.default_rng(3)
    lengths = (40, 300, 511, 512, 650, 64)
    prompts = [make_context(rng, length).tokens.tolist() for length in lengths]
    batch = [Request(prompt, 40) for prompt in prompts]
    batch[3].aborts = 9
    system = prompts[1][:160]
    later = [system + make_context(rng, 90).tokens.tolist(), prompts[4] + [9, 8, 7], prompts[1]]
    batch += [Request(prompt, 12, arrives=90 + 4 * i) for i, prompt in enumerate(later)]
    return batch + [
        Request(make_context(rng, 96 + i).tokens.tolist(), 60, arrives=120) for i in range(12)
    ]


def run(kvzip=None, environment=RUNNER_V2, **engine):
    return run_job(requests(), kvzip, environment, watch_hashed_blocks=True, **ENGINE, **engine)


@pytest.fixture(scope="module")
def stock():
    return run()


@pytest.fixture(scope="module")
def whole():
    return run({**SETTINGS, "keep_ratio": 1.0}, asynchronous=True)


@pytest.fixture(scope="module")
def quarter():
    return run({**SETTINGS, "keep_ratio": 0.25})


@pytest.fixture(scope="module")
def quarter_on_v1():
    return run({**SETTINGS, "keep_ratio": 0.25}, {})


def unaborted(report):
    return [output for number, output in enumerate(report.outputs) if number != 3]


@pytest.mark.versions
def test_the_runner_is_the_one_we_think(whole, quarter_on_v1):
    assert whole.classes["runner"] == "vllm.v1.worker.cpu.model_runner"
    assert quarter_on_v1.classes["runner"] == "vllm.v1.worker.cpu_model_runner"


@pytest.mark.versions
def test_keep_ratio_one_is_token_identical(stock, whole):
    assert unaborted(whole) == unaborted(stock)
    assert whole.metrics["vllm_kvzip_requests_compressed_total"] >= 5
    assert whole.num_preemptions > 0


def test_a_quarter_is_kept_as_on_runner_v1(quarter, quarter_on_v1):
    assert unaborted(quarter) == unaborted(quarter_on_v1)
    for name in ("requests_compressed_total", "blocks_freed_total", "prefix_hits_total"):
        name = f"vllm_kvzip_{name}"
        assert quarter.metrics[name] == quarter_on_v1.metrics[name] > 0


def test_every_block_is_back_and_none_was_written(whole, quarter):
    for report in (whole, quarter):
        assert report.free_blocks[-1] == report.free_blocks[0] == 47
        assert report.written_hashed_blocks == []
        assert report.compared_hashed_blocks["raw"] > 0
