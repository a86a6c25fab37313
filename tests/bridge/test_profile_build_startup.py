"""Start-up with `profile: build`: when it builds, and what it cannot be combined with."""

from pathlib import Path

import pytest
from startup import ON, engine_config, refusal

from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.start import options

pytestmark = pytest.mark.vllm

BUILD = ("--kv-compression-config.profile", "build")


def test_a_profile_is_built_only_where_none_is_found(tmp_path, monkeypatch):
    found = Settings.from_vllm_config(engine_config(*ON, *BUILD))
    assert found.profile_to_build is None
    assert found.scorer == "surrogate"  # the shipped profile has networks
    monkeypatch.setattr(options, "profile_folders", list)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = ("--kv-compression-config.scorer", "surrogate")
    missing = Settings.from_vllm_config(engine_config(*ON, *BUILD, *wanted))
    assert Path(missing.profile_to_build).parent == tmp_path / "vllm-kvzip"
    assert missing.config.scorer == "surrogate"  # what the worker resolves anew
    assert missing.scorer == options.DEFAULT_SCORER


@pytest.mark.parametrize("flags", [("--enable-lora",), ("--skip-tokenizer-init",)])
def test_what_a_profile_cannot_be_built_with_is_refused(capsys, flags):
    message = refusal(capsys, *ON, *BUILD, *flags)
    assert f"profile build does not work with {' '.join(flags)} yet" in message


@pytest.mark.parametrize("given", ["profile_text a.txt", "profile_build_seconds 5"])
def test_settings_of_building_alone_are_refused(capsys, given):
    setting, value = given.split()
    message = refusal(capsys, *ON, f"--kv-compression-config.{setting}", value)
    assert f"{setting} has no effect; set profile to build" in message
