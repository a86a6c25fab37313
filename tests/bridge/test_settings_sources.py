"""Settings given in several ways at once are merged; none is dropped without a word."""

import itertools
import json
from types import SimpleNamespace

import pytest
from startup import ON, engine_config, refusal

from vllm_kvzip.vllm_bridge.settings import Settings, pool_blocks

pytestmark = pytest.mark.vllm

FLAG, DOTTED = "--kv-compression-config", "--kv-compression-config.keep_bytes_ratio"
MIXED = {"mode": "mixed", "scorer": "keydiff", "keep_bytes_ratio": 0.5}


def settings(*flags):
    return Settings.from_vllm_config(engine_config(*flags)).config


def sources(folder):
    """The settings :data:`MIXED`, in each way of the README that is no dotted flag."""
    text = json.dumps(MIXED)
    written = folder / "settings.json"
    written.write_text(text)
    in_yaml = {"flag": {FLAG[2:]: MIXED}, "path": {FLAG[2:]: str(written)}}
    in_yaml["underscores"] = {FLAG[2:].replace("-", "_"): MIXED}
    in_yaml["additional"] = {"additional-config": {"kvzip": MIXED}}
    for name, values in in_yaml.items():
        (folder / f"{name}.yaml").write_text(json.dumps(values))  # JSON is YAML
    return {
        "JSON": [FLAG, text],
        "JSON=": [f"{FLAG}={text}"],
        "file": [FLAG, str(written)],
        "file=": [f"{FLAG}={written}"],
        "additional": ["--additional-config", json.dumps({"kvzip": MIXED, "other": 1})],
        **{f"YAML {name}": ["--config", str(folder / f"{name}.yaml")] for name in in_yaml},
    }


WAYS = ["JSON", "JSON=", "file", "file=", "additional"]
WAYS += [f"YAML {name}" for name in ("flag", "path", "underscores", "additional")]
ONE_BY_ONE = {
    "dotted": [DOTTED, "0.125"],
    "dotted=": [f"{DOTTED}=0.125"],
    "dotted in additional": ["--additional-config.kvzip.keep_bytes_ratio", "0.125"],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dotted", ONE_BY_ONE)
def test_dotted_settings_are_on_top_of_what_is_given_together(tmp_path, way, dotted):
    together, alone = sources(tmp_path)[way], ONE_BY_ONE[dotted]
    for order in itertools.permutations([together, alone, ON]):
        found = settings(*itertools.chain(*order))
        assert (found.mode, found.scorer) == ("mixed", "keydiff")
        # The plugin's own flag wins over additional_config, dotted or not.
        below = "additional" in dotted and "additional" not in way
        assert found.keep_bytes_ratio == (0.5 if below else 0.125)


def test_all_sources_at_once(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text(
        json.dumps({FLAG[2:]: {"mode": "mixed", "seed": 1}, f"{FLAG[2:]}.sink_tokens": 5})
    )
    (tmp_path / "b.json").write_text(json.dumps({"seed": 2, "scorer": "knorm"}))
    monkeypatch.setenv("LLM_KVZIP_MIN_PROMPT_TOKENS", "77")
    monkeypatch.setenv("LLM_KVZIP_SEED", "9")
    monkeypatch.setenv("LLM_KVZIP_RECENT_TOKENS", "9")
    found = settings(
        *ON, f"{FLAG}.keep_ratio=0.3", "--config", str(tmp_path / "a.yaml"),
        FLAG, str(tmp_path / "b.json"), f"{FLAG}.scorer", "keydiff",
        "--additional-config", '{"kvzip": {"recent_tokens": 6, "seed": 8}}',
        "--additional-config.kvzip.budget", "uniform",
    )  # fmt: skip
    assert (found.mode, found.seed, found.scorer, found.keep_ratio) == ("mixed", 2, "keydiff", 0.3)
    assert (found.sink_tokens, found.recent_tokens, found.budget) == (5, 6, "uniform")
    assert found.min_prompt_tokens == 77


def test_what_turns_it_on_survives_a_second_value(tmp_path):
    """Without the flag: an entry in a file, and other entries on the command line."""
    (tmp_path / "a.yaml").write_text(json.dumps({"additional-config": {"kvzip": {"seed": 3}}}))
    config = engine_config("--config", str(tmp_path / "a.yaml"), "--additional-config.other", "1")
    assert Settings.from_vllm_config(config).config.seed == 3
    assert config.additional_config["other"] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([FLAG, '{"keep_ratio": 0.5}', DOTTED, "0.5"], "give one of them"),
        ([DOTTED, "0.5", FLAG, "{broken"], "not valid JSON"),
        ([FLAG, "/none.json", DOTTED, "0.5"], "'/none.json' is neither JSON nor a file"),
        ([FLAG, '{"seed": 1, "seed": 2}'], "seed is given twice in one object; give it once"),
        (
            ["--additional-config", '{"kvzip": "on"}', "--additional-config.kvzip.seed", "1"],
            "additional_config['kvzip'] must be a JSON object",
        ),
    ],
)
def test_what_is_wrong_in_one_of_them_is_one_sentence(capsys, flags, message):
    assert message in refusal(capsys, *ON, *flags)


@pytest.mark.parametrize(
    ("local_only", "offline_rank", "blocks"),
    [(False, None, 100), (True, None, 200), (False, 0, 400)],
)
def test_blocks_of_one_engine_are_told_from_those_of_all(local_only, offline_rank, blocks):
    """vLLM adds up the blocks of the engines that a server talks to."""
    parallel = SimpleNamespace(
        data_parallel_size=4, data_parallel_size_local=2, local_engines_only=local_only,
        data_parallel_rank_local=offline_rank,
    )  # fmt: skip
    config = SimpleNamespace(
        parallel_config=parallel, cache_config=SimpleNamespace(num_gpu_blocks=400)
    )
    assert pool_blocks(config) == blocks
    config.cache_config.num_gpu_blocks = None
    assert pool_blocks(config) == 0
