"""`profile: build`: an engine makes its own profile, keeps it, and serves when it cannot."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from engine_job import MODEL, Request, run_job

from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, make_context, question_prompt
from vllm_kvzip.head_profiles.head_profile import load_profile
from vllm_kvzip.head_profiles.networks import load_surrogate
from vllm_kvzip.vllm_bridge.start.options import DEFAULT_BUDGET, DEFAULT_SCORER

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ONE_THREAD = {
    "OMP_NUM_THREADS": "1"
}  # two engines on few cores would wait for each other's threads

START = """
import sys, json
from vllm import LLM
LLM(**json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The tiny model under another architecture's name, for which no profile is shipped."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mistral"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Words that the tiny model knows, as a user would give them for a model of their own."""
    folder = tmp_path_factory.mktemp("build")
    rng = np.random.default_rng(5)
    words = [VOCABULARY.words[t] for _ in range(7) for t in make_context(rng, 1024).tokens]
    (folder / "text.txt").write_text(" ".join(words))
    return {
        "profile": "build", "profile_cache": str(folder / "cache"), "repeat_prompt": "repeat",
        "profile_text": str(folder / "text.txt"), "keep_ratio": 0.3,
    }  # fmt: skip


def questions():
    context = make_context(np.random.default_rng(3), 1024, fact_density=0.3)
    declared = {"extra_args": {"kvzip_context_tokens": 1024}}
    requests, wanted = [Request(context.tokens.tolist(), 2, options=declared)], []
    for key in list(context.facts)[::3]:
        prompt, value = question_prompt(context, key)
        requests.append(Request(prompt, 1, arrives=6, options=declared))
        wanted.append(value)
    return requests, wanted


def answered(report, wanted):
    return np.mean([o[0] == value for o, value in zip(report.outputs[1:], wanted, strict=True)])


def start(model, kvzip, count):
    """Start some engines at once and return what they logged."""
    engine = {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "block_size": 32,
        "gpu_memory_utilization": 0.3, "additional_config": {"kvzip": kvzip},
    }  # fmt: skip
    command = [sys.executable, "-c", START, json.dumps(engine)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **ONE_THREAD}
    started = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(count)
    ]
    logs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * count, logs
    return logs


@pytest.fixture(scope="module")
def logs(model, settings):
    """Of two engines that start at once; the profile is there afterwards."""
    return start(model, settings, 2)


def test_two_engines_build_once_and_later_ones_load(model, settings, logs):
    assert sum("was built in" in log for log in logs) == 1
    assert all("scorer surrogate, budget adaptive" in log for log in logs)
    folder = Path(settings["profile_cache"])
    (path,) = folder.glob("*.json")
    profile = load_profile(path)
    assert profile.model.architecture == "MistralForCausalLM"
    assert profile.provenance.repeated_share > 0.9
    assert profile.provenance.repeat_prompt == "repeat"
    assert len(load_surrogate(path.with_suffix(".safetensors"), profile.model)) == 4
    written = path.stat().st_mtime_ns
    requests, wanted = questions()
    report = run_job(requests, kvzip=settings, model=model, environment=ONE_THREAD)
    assert path.stat().st_mtime_ns == written  # loaded, not built
    assert answered(report, wanted) >= 0.9
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.metrics["vllm_kvzip_blocks_freed_total"] > 0


def test_the_engine_that_builds_answers_from_it_without_a_folder_to_keep_it(
    model, settings, tmp_path
):
    (tmp_path / "file").write_text("no folder")
    requests, wanted = questions()
    kvzip = {**settings, "profile_cache": str(tmp_path / "file" / "cache")}
    report = run_job(requests, kvzip=kvzip, model=model, environment=ONE_THREAD)
    assert answered(report, wanted) >= 0.9
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == 1


def test_two_ranks_build_what_one_builds(model, settings, logs, tmp_path):
    assert sum("was built in" in log for log in logs) == 1
    (alone,) = Path(settings["profile_cache"]).glob("*.json")
    requests, wanted = questions()
    kvzip = {**settings, "profile_cache": str(tmp_path)}
    report = run_job(
        requests, kvzip=kvzip, model=model, environment=ONE_THREAD,
        tensor_parallel_size=2, distributed_executor_backend="mp",
    )  # fmt: skip
    (together,) = tmp_path.glob("*.json")
    one, two = map(load_profile, (alone, together))
    np.testing.assert_allclose(one.importance, two.importance, atol=1e-4)
    networks = load_surrogate(together.with_suffix(".safetensors"), two.model)
    assert [len(layer.out) for layer in networks] == [one.model.num_kv_heads] * 4
    assert answered(report, wanted) >= 0.9
    assert report.free_blocks[-1] == report.free_blocks[0]


def test_full_layers_beside_windows_get_a_profile(settings, tmp_path):
    """Of the tiny model with windows, again as an architecture for which none is shipped."""
    folder = tmp_path / "tiny-llama"
    shutil.copytree(MODEL.with_name("tiny-windowed"), folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    requests, wanted = questions()
    kvzip = {**settings, "profile_cache": str(tmp_path / "cache"), "keep_ratio": 0.5}
    report = run_job(requests, kvzip=kvzip, model=folder, environment=ONE_THREAD)
    (path,) = (tmp_path / "cache").glob("*.json")
    profile = load_profile(path)
    assert profile.provenance.repeated_share > 0.9
    retrieving, others = np.array(profile.importance)  # of the model's layers 2 and 3
    assert min(retrieving) > 3 * max(others)
    assert len(load_surrogate(path.with_suffix(".safetensors"), profile.model)) == 2
    assert answered(report, wanted) >= 0.9
    assert report.free_blocks[-1] == report.free_blocks[0]
    assert report.metrics["vllm_kvzip_requests_compressed_total"] == 1


def test_without_time_the_engine_serves_without_a_profile(model, settings, tmp_path):
    kvzip = {**settings, "profile_cache": str(tmp_path), "profile_build_seconds": 0.01}
    (log,) = start(model, kvzip, 1)
    assert log.count("No head profile could be built (it took longer than") == 1
    assert f"scorer {DEFAULT_SCORER}, budget {DEFAULT_BUDGET}" in log
    assert list(tmp_path.glob("*.json")) == []
