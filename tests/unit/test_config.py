"""Configuration: precedence of its sources, and one clear sentence for everything wrong."""

import json

import pytest

from vllm_kvzip.config import KVzipConfig, is_enabled, load_config
from vllm_kvzip.errors import ConfigError


def test_first_source_wins_setting_by_setting():
    environ = {"LLM_KVZIP_KEEP_RATIO": "0.9", "LLM_KVZIP_SEED": "3", "LLM_KVZIP_SINK_TOKENS": "8"}
    additional = {"kvzip": {"keep_ratio": 0.7, "seed": 4}}
    config = load_config('{"keep_ratio": 0.3}', environ, additional)
    assert (config.keep_ratio, config.seed, config.sink_tokens) == (0.3, 4, 8)
    assert config.recent_tokens == KVzipConfig().recent_tokens


def test_flag_may_be_a_file_or_a_mapping(tmp_path):
    file = tmp_path / "kvzip.json"
    file.write_text(json.dumps({"keep_ratio": 0.125}))
    assert load_config(str(file), {}, None).keep_ratio == 0.125
    assert load_config({"keep_ratio": 0.2}, {}, None).keep_ratio == 0.2
    assert load_config(None, {}, None) == KVzipConfig()


@pytest.mark.parametrize(
    ("flag", "environ", "additional", "message"),
    [
        ('{"keep_ratio": 0}', {}, {}, "--kv-compression-config: keep_ratio=0 is wrong, .*than 0"),
        ('{"keep_ratio": 2}', {}, {}, "--kv-compression-config: keep_ratio=2 is wrong, .* 1"),
        ('{"keep_ratio": "half"}', {}, {}, "keep_ratio='half' is wrong"),
        ('{"keep_ration": 0.5}', {}, {}, "no setting keep_ration; did you mean keep_ratio?"),
        ('{"zzz": 1}', {}, {}, "no setting zzz; known are mode, keep_ratio"),
        ('{"budget": "all"}', {}, {}, "budget='all' is wrong, .*'uniform', 'profile', .*or"),
        ("{broken", {}, {}, "--kv-compression-config: not valid JSON"),
        ("[1]", {}, {}, "neither JSON nor a file"),
        ("missing.json", {}, {}, "'missing.json' is neither JSON nor a file that can be read"),
        (None, {"LLM_KVZIP_KEEP_RATIO": "0"}, {}, "LLM_KVZIP_KEEP_RATIO: keep_ratio='0' is wrong"),
        (None, {"LLM_KVZIP_KEEP_RATO": "1"}, {}, "LLM_KVZIP_KEEP_RATO: .*mean keep_ratio?"),
        (None, {}, {"kvzip": {"seed": "x"}}, r"additional_config\['kvzip'\]: seed='x' is wrong"),
        (None, {}, {"kvzip": "on"}, "must be a JSON object"),
        ('{"mode": "drop"}', {}, {}, "mode='drop' is wrong, .*'evict', 'quantize' or 'mixed'"),
        (
            '{"keep_bytes_ratio": 0.2}', {"LLM_KVZIP_KEEP_RATIO": "0.5"}, {},
            "keep_bytes_ratio stands in place of keep_ratio; give one of them",
        ),
        (
            '{"key_format": "int8"}', {}, {},
            "key_format has no effect in mode evict; set mode to quantize or mixed",
        ),
        (
            '{"mode": "quantize", "full_share": 0.3}', {}, {},
            "full_share has no effect in mode quantize; set mode to mixed",
        ),
    ],
)  # fmt: skip
def test_wrong_input_is_one_sentence(flag, environ, additional, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(flag, environ, additional)
    assert "\n" not in str(caught.value)
    assert str(caught.value)[-1] in ".?"


@pytest.mark.parametrize(
    ("settings", "ratio"),
    [
        ("{}", 0.5),
        ('{"mode": "quantize"}', 1.0),
        ('{"mode": "mixed"}', 0.5),
        ('{"mode": "quantize", "keep_ratio": 0.4}', 0.4),
        ('{"mode": "mixed", "keep_bytes_ratio": 0.1}', 0.1),
        ('{"keep_bytes_ratio": 0.1}', 0.1),
    ],
)
def test_the_ratio_that_counts(settings, ratio):
    assert load_config(settings, {}, None).ratio == ratio


def test_unreadable_files_and_odd_keys_are_one_sentence(tmp_path):
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe{")
    for flag in (str(binary), "~nobody-of-that-name/kvzip.json", "nul\0byte"):
        with pytest.raises(ConfigError, match="neither JSON nor a file that can be read") as caught:
            load_config(flag, {}, None)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="there is no setting 1"):
        load_config(None, {}, {"kvzip": {1: 2}})


def test_three_ways_to_turn_it_on():
    assert not is_enabled(None, {}, None)
    assert is_enabled("kvzip", {}, None)
    assert is_enabled(None, {"LLM_KVZIP_ENABLED": "1"}, {})
    assert is_enabled(None, {"LLM_KVZIP_ENABLED": "0"}, {"kvzip": {}})
    assert not is_enabled(None, {"LLM_KVZIP_ENABLED": "off", "LLM_KVZIP_SEED": "1"}, {})
    with pytest.raises(ConfigError, match="no variable LLM_KVZIP_ENABLE; did you mean LLM_KVZIP_E"):
        is_enabled(None, {"LLM_KVZIP_ENABLE": "1"}, {})
    with pytest.raises(ConfigError, match=r"LLM_KVZIP_ENABLED='perhaps' must be 1 \(on\) or 0"):
        is_enabled(None, {"LLM_KVZIP_ENABLED": "perhaps"}, {})


def test_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        KVzipConfig().keep_ratio = 0.1
