"""Two pipeline stages, each with half of the layers, keep what one process keeps.

What happens when one stage cannot compress a prompt is in ``test_bad_prompts.py``.
"""

import json

import numpy as np
import pytest
from copy_load import copy_requests
from engine_job import TWO_STAGES, Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import copy_prompt, make_context
from vllm_kvzip.head_profiles.head_profile import profile_folders

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

OF_STEPS = "attention_seconds"  # steps are other ones where two are on their way


def whole_quarters():
    """Requests whose prefixes have a number of blocks that four divides."""
    rng = np.random.default_rng(6)
    contexts = [make_context(rng, n) for n in (384, 512, 640)]
    return [
        Request(copy_prompt(context, 20)[0], 24, arrives=i) for i, context in enumerate(contexts)
    ]


def balanced_profile(folder):
    """A profile whose shares make whole pages, as many in each stage, in another order of layers.

    Nothing is left to share out then, which stages do among their own heads.
    """
    profile = json.loads((profile_folders()[-1] / "tiny-retriever.json").read_text())
    profile["importance"] = [[0.1] * 4, [0.9] * 4, [0.9] * 4, [0.1] * 4]
    profile["budgets"] = {"0.5": [[0.25] * 4, [0.75] * 4, [0.75] * 4, [0.25] * 4]}
    profile["tiers"] = None
    path = folder / "profile.json"
    path.write_text(json.dumps(profile))
    return str(path)


def held_at_most(report):
    """The most blocks that each request held, and those that it held once compressed."""
    held = {}
    for step in report.held_blocks:
        for number, blocks in step.items():
            held.setdefault(number, []).append(blocks)
    return {number: (max(blocks), blocks[-1]) for number, blocks in held.items()}


def test_keep_one_equals_stock():
    stock = run_job(copy_requests())
    two = run_job(copy_requests(), kvzip={"keep_ratio": 1.0}, **TWO_STAGES)
    assert two.outputs == stock.outputs
    assert two.free_blocks[-1] == two.free_blocks[0]
    assert two.metrics["vllm_kvzip_requests_compressed_total"] == 3
    assert two.batches_in_flight == 2


def test_each_stage_has_the_networks_of_its_layers():
    check_the_same_is_kept(
        copy_requests(), {"keep_ratio": 0.4, "scorer": "surrogate", "budget": "uniform"}
    )


def test_each_stage_has_its_rows_of_a_profile(tmp_path):
    by_profile = {"budget": "profile", "profile": balanced_profile(tmp_path)}
    check_the_same_is_kept(whole_quarters(), {"keep_ratio": 0.5, "scorer": "keydiff", **by_profile})


def check_the_same_is_kept(requests, settings):
    one = run_job(requests, kvzip=settings)
    two = run_job(requests, kvzip=settings, **TWO_STAGES)
    assert two.outputs == one.outputs
    assert held_at_most(two) == held_at_most(one)
    assert two.free_blocks[-1] == two.free_blocks[0]
    for name, value in one.metrics.items():
        if "seconds_sum" not in name and OF_STEPS not in name:
            assert two.metrics[name] == value, name
