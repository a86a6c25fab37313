"""Profiles that engines build: one file a model, whole or not there, one builder at a time."""

import threading
import time

import pytest
import torch

from vllm_kvzip.head_profiles.head_profile import HeadProfile, ModelFingerprint, Provenance
from vllm_kvzip.head_profiles.networks import RECENCY_TOKENS, LayerSurrogate
from vllm_kvzip.head_profiles.profile_cache import (
    build_lock,
    cache_file,
    is_usable,
    store,
    weight_files,
)

MODEL = ModelFingerprint(
    architecture="A", num_layers=1, num_query_heads=2, num_kv_heads=1, head_dim=4, name="org/m"
)


def networks():
    width = 2 * 4 + len(RECENCY_TOKENS)
    shapes = (1, width, 3), (1, 3), (1, 3), (1,)
    return [LayerSurrogate(*(torch.ones(shape) for shape in shapes))]


def profile():
    made = Provenance(method="m", texts=["t"], versions={}, created="2026-01-01")
    return HeadProfile(
        schema_version=1, model=MODEL, provenance=made, importance=[[0.5]], budgets={"0.5": [[0.5]]}
    )


def test_what_was_stored_is_whole(tmp_path):
    path = cache_file(tmp_path / "new", MODEL, {})
    path.parent.mkdir()
    assert not is_usable(path, MODEL)
    store(path, profile(), networks())
    assert is_usable(path, MODEL)
    assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".safetensors"]
    assert not is_usable(path, MODEL.model_copy(update={"num_layers": 2}))


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_part_that_is_missing_or_broken_is_no_profile(tmp_path, suffix):
    path = cache_file(tmp_path, MODEL, {})
    store(path, profile(), networks())
    path.with_suffix(suffix).write_text("{")
    assert not is_usable(path, MODEL)
    path.with_suffix(suffix).unlink()
    assert not is_usable(path, MODEL)


def test_fine_tunes_of_one_shape_have_files_of_their_own(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1234")
    (tmp_path / "notes.txt").write_text("no weights")
    ((name, size, changed),) = weight_files(str(tmp_path))
    assert (name, size) == ("model.safetensors", 4)
    assert weight_files(str(weights)) == [(name, size, changed)]
    assert weight_files("org/on-a-hub") == []
    first = cache_file(tmp_path, MODEL, {"weights": weight_files(str(tmp_path))})
    assert first == cache_file(tmp_path, MODEL, {"weights": weight_files(str(tmp_path))})
    weights.write_bytes(b"12345")
    assert first != cache_file(tmp_path, MODEL, {"weights": weight_files(str(tmp_path))})
    assert first.parent == tmp_path and first.name.startswith("org_m-")


def hold(path, seconds, ready):
    with build_lock(path, time.monotonic() + 10):
        ready.set()
        time.sleep(seconds)


def test_another_builder_waits_or_gives_up(tmp_path):
    """Locks belong to open files, so that a thread stands for a process here."""
    path = tmp_path / "deep" / "m.json"
    ready = threading.Event()
    other = threading.Thread(target=hold, args=(path, 1.0, ready))
    other.start()
    assert ready.wait(10)
    with (
        pytest.raises(TimeoutError, match="another process is still building it"),
        build_lock(path, time.monotonic()),
    ):
        pass
    begin = time.monotonic()
    with build_lock(path, begin + 30):
        assert time.monotonic() - begin > 0.3
    other.join()


def test_a_folder_that_cannot_be_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), build_lock(tmp_path / "file" / "m.json", time.monotonic()):
        pass
