"""Start-up: what turns compression on, what is refused, and that off means off.

Everything short of starting an engine is done through vLLM's own parser and configuration, in this
process; one real `vllm serve` shows what a user sees.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import vllm
from engine_job import MODEL
from startup import ON, engine_config, refusal
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.input_processor import InputProcessor

from vllm_kvzip.errors import KVzipError
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY
from vllm_kvzip.head_profiles.head_profile import load_profile, profile_folders
from vllm_kvzip.vllm_bridge import platforms, versions
from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.start import options, plugin

pytestmark = pytest.mark.vllm

STAGES = ["--pipeline-parallel-size", "2", "--no-enforce-eager"]
NGRAM = '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'


def test_flag_sets_worker_block_size_and_settings():
    flags = ("--kv-compression-config", '{"keep_ratio": 0.3, "scorer": "profile"}')
    config = engine_config(*ON, *flags)
    settings = Settings.from_vllm_config(config)
    assert config.parallel_config.worker_cls == platforms.CPU.worker_class
    assert config.scheduler_config.get_scheduler_cls().__name__ == "HeadPageScheduler"
    assert config.cache_config.block_size == 32
    assert settings.config.keep_ratio == 0.3
    assert (settings.scorer, settings.budget) == ("profile", "profile")
    assert len(settings.head_fractions(0.3)) == 4
    json.dumps(config.additional_config)  # travels as JSON


def test_further_api_servers_read_the_flags_where_vllm_put_them():
    """They get the parsed arguments, and read them before plugins are loaded."""
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    flags = ["--kv-compression-config.keep_ratio", "0.3", "--additional-config"]
    flags.append('{"kvzip": {"keep_ratio": 0.6, "seed": 3}, "other": 1}')
    args = parser.parse_args(["--model", str(MODEL), *ON, *flags])
    first = AsyncEngineArgs.from_cli_args(args)
    assert Settings.from_vllm_config(first.create_engine_config()).config.keep_ratio == 0.3
    other_process = AsyncEngineArgs.from_cli_args(args)
    del other_process.kvzip_cli_args
    config = other_process.create_engine_config()
    settings = Settings.from_vllm_config(config).config
    assert (settings.keep_ratio, settings.seed) == (0.3, 3)
    assert config.additional_config["other"] == 1
    assert config.cache_config.block_size == 32


def test_a_block_size_of_the_user_is_kept():
    assert engine_config(*ON, "--block-size", "64").cache_config.block_size == 64


def test_environment_and_offline_api_turn_it_on(monkeypatch):
    by_dictionary = EngineArgs(
        model=str(MODEL), additional_config={"kvzip": {"keep_ratio": 0.4, "profile": "none"}}
    ).create_engine_config()
    settings = Settings.from_vllm_config(by_dictionary)
    assert (settings.scorer, settings.budget) == (options.DEFAULT_SCORER, options.DEFAULT_BUDGET)
    monkeypatch.setenv("LLM_KVZIP_ENABLED", "1")
    monkeypatch.setenv("LLM_KVZIP_KEEP_RATIO", "0.2")
    by_variable = EngineArgs(model=str(MODEL)).create_engine_config()
    assert Settings.from_vllm_config(by_variable).config.keep_ratio == 0.2


def test_off_means_off():
    stock = engine_config()
    assert stock.parallel_config.worker_cls == "vllm.v1.worker.cpu_worker.CPUWorker"
    assert stock.scheduler_config.scheduler_cls is None
    assert stock.additional_config == {}
    assert stock.cache_config.block_size in (128, 16)  # since 0.33 the worker makes 128 of it


def test_off_imports_nothing_heavy():
    code = (
        "import sys; from vllm.plugins import load_general_plugins; load_general_plugins();"
        "print(sorted(m for m in sys.modules if m.startswith('vllm_kvzip')))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = found.stdout.strip().splitlines()[-1]
    assert "vllm_kvzip.vllm_bridge.start.plugin" in loaded
    for heavy in (
        "scoring",
        "pipeline",
        "worker",
        "cache_spec",
        "attention",
        "stats_export",
        "scheduler",
        "admission",
    ):
        assert heavy not in loaded


def test_registering_twice_is_harmless():
    plugin.register()
    plugin.register()
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    assert parser.format_help().count("--kv-compression-config JSON") <= 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--kv-compression-config.keep_ratio", "0"], "keep_ratio=0 is wrong"),
        (["--kv-compression-config.keep_ratio", "2"], "keep_ratio=2 is wrong"),
        (["--kv-compression-config", '{"keep_ration": 1}'], "did you mean keep_ratio"),
        (
            ["--kv-compression-config.scorer", "keydif"],
            "no scorer keydif; did you mean keydiff",
        ),
        (["--kv-compression-config.profile", "/none.json"], "/none.json cannot be read"),
        (
            ["--pipeline-parallel-size", "2"],
            "--pipeline-parallel-size 2 with --enforce-eager on the CPU, where vLLM itself fails; "
            "remove --enforce-eager",
        ),
        (
            [*STAGES, "--kv-compression-config.scorer", "kvzip"],
            "Scorer kvzip does not work with --pipeline-parallel-size 2 yet; choose surrogate with "
            "a profile of `vllm-kvzip profile`, or contrast or keydiff without one",
        ),
        (
            [*STAGES, "--kv-compression-config.profile", "build"],
            "profile build does not work with --pipeline-parallel-size 2 yet; build the profile "
            "with `vllm-kvzip profile`",
        ),
        (
            [*STAGES, "--speculative-config", NGRAM],
            "speculative decoding with --pipeline-parallel-size 2 yet; remove one of them",
        ),
        (["--block-size", "16"], "--block-size 16 on the CPU; use a multiple of 32"),
        (
            ["--kv-cache-dtype", "fp8"],
            "--kv-cache-dtype fp8 on the CPU for a model that runs in float32; set it to auto",
        ),
        (
            ["--kv-cache-dtype", "int8_per_token_head"],
            "--kv-cache-dtype int8_per_token_head for a model that runs in float32; set it to auto",
        ),
        (
            ["--kv-cache-dtype", "turboquant_4bit_nc"],
            "--kv-cache-dtype turboquant_4bit_nc for a model that runs in float32; set it to auto",
        ),
        (["--scheduler-cls", "my.Scheduler"], "--scheduler-cls my.Scheduler; remove the flag"),
        (["--kv-compression-config.prefix_reuse", "never"], "prefix_reuse='never' is wrong"),
        (["--kv-compression-config.reuse_ttl_seconds", "0"], "reuse_ttl_seconds=0 is wrong"),
    ],
)
def test_wrong_flags_are_one_sentence(capsys, flags, message):
    assert message in refusal(capsys, *ON, *flags)


def test_streaming_input_sessions_are_refused_where_they_enter():
    """Their prompt grows while its compressed part is in use; the engine would stop."""
    processor = InputProcessor(engine_config(*ON))
    tokens = {"type": "token", "prompt_token_ids": [7] * 300}
    request = processor.process_inputs("a", tokens, SamplingParams(), ("generate",))
    assert len(request.prompt_token_ids) == 300
    with pytest.raises(VLLMValidationError, match="Streaming-input sessions"):
        processor.process_inputs("b", tokens, SamplingParams(), ("generate",), resumable=True)


KVZIP = ("--kv-compression-config.scorer", "kvzip")


def test_scorer_kvzip_takes_the_wording_of_the_profile_and_ranks_globally():
    settings = Settings.from_vllm_config(engine_config(*ON, *KVZIP))
    repeat = VOCABULARY.ids["repeat"]
    assert settings.repeat_ids == [[repeat], [repeat]]
    assert settings.budget == "adaptive"
    wording = ("--kv-compression-config.repeat_prompt", "w1 w2")
    named = Settings.from_vllm_config(engine_config(*ON, *KVZIP, *wording))
    assert named.repeat_ids == [[VOCABULARY.ids["w1"], VOCABULARY.ids["w2"]]] * 2
    assert Settings.from_vllm_config(engine_config(*ON)).repeat_ids is None


def test_a_wording_without_a_token_is_refused(capsys):
    message = refusal(capsys, *ON, *KVZIP, "--kv-compression-config.repeat_prompt", " ")
    assert "repeat_prompt ' ' has no token in this model's vocabulary" in message


@pytest.mark.parametrize("flag", ["--enable-lora", "--skip-tokenizer-init"])
def test_what_scorer_kvzip_cannot_work_with_is_refused(capsys, flag):
    message = refusal(capsys, *ON, *KVZIP, flag)
    assert f"Scorer kvzip does not work with {flag} yet; choose another scorer" in message


def test_settings_without_the_flag_are_refused(capsys):
    message = refusal(capsys, "--kv-compression-config.keep_ratio", "0.5")
    assert "has no effect without --kv-compression kvzip" in message


@pytest.mark.parametrize(
    "setting", ["budget profile", "scorer profile", "budget retrieval", "scorer surrogate"]
)
def test_what_needs_a_profile_is_refused_without_one(capsys, setting):
    name, value = setting.split()
    flags = ("--kv-compression-config", f'{{"profile": "none", "{name}": "{value}"}}')
    assert f"{setting} needs a head profile" in refusal(capsys, *ON, *flags)


def test_scorer_surrogate_takes_the_networks_beside_the_profile(tmp_path, capsys):
    flags = (*ON, "--kv-compression-config.scorer", "surrogate")
    settings = Settings.from_vllm_config(engine_config(*flags))
    assert Path(settings.surrogate).name == "tiny-retriever.safetensors"
    assert len(settings.surrogate_digest) == 64
    assert settings.budget == "adaptive"
    alone = tmp_path / "alone.json"
    alone.write_bytes(Path(settings.surrogate).with_suffix(".json").read_bytes())
    message = refusal(capsys, *flags, "--kv-compression-config.profile", str(alone))
    assert f"Scorer surrogate needs {tmp_path}/alone.safetensors; build it with" in message


def test_the_scorer_is_chosen_by_what_lies_beside_the_profile(tmp_path):
    assert Settings.from_vllm_config(engine_config(*ON)).scorer == "surrogate"
    none = ("--kv-compression-config.profile", "none")
    settings = Settings.from_vllm_config(engine_config(*ON, *none))
    assert (settings.scorer, settings.budget) == ("contrast", "adaptive")
    profile = profile_folders()[-1] / "tiny-retriever.json"
    alone = tmp_path / "alone.json"
    alone.write_bytes(profile.read_bytes())
    flags = ("--kv-compression-config.profile", str(alone))
    settings = Settings.from_vllm_config(engine_config(*ON, *flags))
    assert (settings.scorer, settings.budget) == ("contrast", "adaptive")


PROMISE = ("--kv-compression-config.quality_loss", "0.02")
QUANTIZE = ("--kv-compression-config.mode", "quantize")
MIXED = ("--kv-compression-config.mode", "mixed")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kv-compression-config.prefill_budget", "63"), "prefill_budget=63 must be at least 64"),
        (
            ("--kv-compression-config.prefill_budget", "100", "--block-size", "64"),
            "prefill_budget=100 must be at least 128: two blocks of 64 tokens",
        ),
        (
            ("--kv-compression-config.prefill_budget", "640",
             "--kv-compression-config.scorer", "kvzip"),
            "Scorer kvzip does not work with prefill_budget",
        ),
        (("--kv-compression-config.prefill_budget", "0"), "prefill_budget=0 is wrong"),
        (("--kv-compression-config.decode_budget", "63"), "decode_budget=63 must be at least 64"),
        ((*PROMISE, *QUANTIZE), "quality_loss does not work with mode quantize yet"),
        (
            (*PROMISE, "--kv-compression-config.decode_budget", "640"),
            "quality_loss does not work with decode_budget yet",
        ),
        (
            (*PROMISE, "--kv-compression-config.budget", "uniform"),
            "quality_loss does not work with budget uniform yet",
        ),
        (
            (*PROMISE, "--kv-compression-config.scorer", "keydiff"),
            "quality_loss needs a head profile with a loss curve of scorer keydiff",
        ),
        (
            (*PROMISE, "--kv-compression-config.profile", "none"),
            "and no head profile matches this model; build one",
        ),
        (
            ("--kv-compression-config.decode_budget", "127", "--block-size", "32",
             *MIXED, "--kv-compression-config.recent_tokens", "40"),
            "decode_budget=127 must be at least 128: two blocks of 32 tokens, and room for the 44 "
            "tokens that every head keeps in each tier",
        ),
        (
            ("--kv-compression-config.decode_budget", "640",
             "--kv-compression-config.scorer", "kvzip"),
            "Scorer kvzip does not work with decode_budget",
        ),
    ],
)  # fmt: skip
def test_budgets_in_tokens_that_cannot_work_are_refused(capsys, flags, message):
    assert message in refusal(capsys, *ON, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((*QUANTIZE, "--kv-compression-config.key_format", "fp4"), "key_format='fp4' is wrong"),
        ((*QUANTIZE, "--kv-compression-config.keep_ratio", "0.5",
          "--kv-compression-config.keep_bytes_ratio", "0.5"), "give one of them"),
    ],
)  # fmt: skip
def test_modes_that_cannot_work_are_refused(capsys, flags, message):
    assert message in refusal(capsys, *ON, *flags)


def test_a_profiles_tiers_are_for_the_cache_they_were_made_for(caplog, monkeypatch):
    asked = '{"mode": "mixed", "keep_bytes_ratio": 0.125, "scorer": "profile"}'
    flags = [*ON, "--kv-compression-config", asked]
    settings = Settings.from_vllm_config(engine_config(*flags, "--dtype", "bfloat16"))
    rule = settings.rule(32, 32, 2)
    assert rule.tiers.shares == tuple(
        (held, full) for held, _, full in settings.head_tiers["shares"]
    )
    assert rule.tiers.full_share_at(0.9) > 0.5
    full, kept = settings.tier_fractions(0.125)
    assert sum(map(sum, full)) <= sum(map(sum, kept)) <= 16
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        settings = Settings.from_vllm_config(engine_config(*flags, "--dtype", "float32"))
    assert settings.head_tiers is None
    assert "made for quantized KV pairs of 27 %" in caplog.text
    assert settings.rule(32, 32, 4).tiers.full_share_at(0.125) == 0.1


def test_budget_retrieval_leaves_whole_heads_whatever_the_profile_says(tmp_path):
    """Like DuoAttention: from the importance alone."""
    profile = json.loads(Path("profiles/tiny-retriever.json").read_text())
    profile["budgets"] = {"0.5": [[0.5] * 4] * 4}
    even = tmp_path / "even.json"
    even.write_text(json.dumps(profile))
    flags = [f"--kv-compression-config.{s}" for s in ("profile", "keep_ratio", "budget")]
    given = (*ON, flags[0], str(even), flags[1], "0.25", flags[2])
    by_profile = Settings.from_vllm_config(engine_config(*given, "profile")).head_fractions(0.25)
    by_head = Settings.from_vllm_config(engine_config(*given, "retrieval")).head_fractions(0.25)
    assert by_profile == [[0.25] * 4] * 4
    assert by_head == [[0.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4]


def test_broken_and_foreign_profiles_are_refused(capsys, tmp_path):
    flag = "--kv-compression-config.profile"
    values = json.loads((profile_folders()[1] / "tiny-retriever.json").read_text())
    broken, foreign = tmp_path / "broken.json", tmp_path / "foreign.json"
    broken.write_text(json.dumps({**values, "schema_version": 7}))
    assert "broken at schema_version" in refusal(capsys, *ON, flag, str(broken))
    foreign.write_text(json.dumps({**values, "model": {**values["model"], "head_dim": 64}}))
    assert load_profile(foreign).model.head_dim == 64
    message = refusal(capsys, *ON, flag, str(foreign))
    assert "its head_dim is 64, the running model's is 32" in message


@pytest.mark.parametrize(
    ("running", "said"),
    [
        (versions.TESTED_VERSIONS[0], ""),
        ("0.99.1", "but 0.99.1 is running: compare"),
        ("0.33.0", "but 0.33.0 is running, with which no engine was tested: compare"),
    ],
)
def test_an_untested_vllm_is_a_warning(monkeypatch, caplog, running, said):
    monkeypatch.setattr(versions, "running_version", lambda: running)
    monkeypatch.setattr(options.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        config = engine_config(*ON)
    assert config.parallel_config.worker_cls == platforms.CPU.worker_class
    assert said in caplog.text
    assert ("was tested with vLLM 0.31.0 and 0.32.0, but" in caplog.text) == bool(said)


def test_an_old_vllm_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(vllm, "__version__", "0.30.2+cpu")
    assert "needs vLLM 0.31 or newer, but 0.30.2 is running" in refusal(capsys, *ON)


def test_the_offline_api_raises_what_the_command_prints():
    arguments = EngineArgs(model=str(MODEL), additional_config={"kvzip": {"keep_ratio": 3}})
    with pytest.raises(KVzipError, match="keep_ratio=3 is wrong"):
        arguments.create_engine_config()


@pytest.mark.slow
def test_vllm_serve_ends_with_one_sentence_and_an_exit_code():
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODEL), *ON]
    flags = ["--kv-compression-config.keep_ratio", "2"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("vllm-kvzip: error: ")
    assert "Traceback" not in done.stderr
