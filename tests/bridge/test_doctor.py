"""The doctor says what start-up would: the same checks, and figures of the plugin's own rules."""

import json

import pytest
from engine_job import MODEL

from vllm_kvzip.command.doctor import main

SETTING = "--kv-compression-config."
STAGES = ["--pipeline-parallel-size", "2"]


@pytest.fixture(autouse=True)
def loud_vllm(monkeypatch):
    """The command quiets vLLM's log for its process; other tests of this process read that log."""
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "INFO")
    monkeypatch.setenv("VLLM_LOGGING_STREAM", "ext://sys.stderr")


def doctor(capsys, *arguments):
    code = main(["--model", str(MODEL), "--dtype", "float32", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_all_is_well(capsys):
    code, found = doctor(capsys, "--prompt-tokens", "1024", "1040", "--memory-gib", "0.25")
    assert code == 0
    assert found["starts"] and found["refusal"] is None and found["warnings"] == []
    compression = found["compression"]
    assert compression["profile"].endswith("tiny-retriever.json")
    del compression["profile"]
    assert compression == {
        "architecture": "LlamaForCausalLM", "num_layers": 4, "num_attention_layers": 4,
        "compressed_layers": None, "left_alone": {}, "window": None, "shares": {"2048": 1.0},
        "num_kv_heads": 4, "head_size": 32, "attention": "full attention",
        "num_ranks": 1, "num_stages": 1,
        "builds_profile": False, "scorer": "surrogate", "budget": "adaptive", "mode": "evict",
        "keep_ratio": 0.5, "counts": "KV pairs", "block_size": 32, "pages_per_head": 1,
        "cache_dtype": "float32", "max_model_len": 2048, "prefill_budget": None,
        "decode_budget": None, "quality_loss": None,
    }  # fmt: skip
    blocks = 2**28 // (4 * 4 * 2 * 32 * 32 * 4) - 1  # layers, heads, K and V, tokens, size, bytes
    assert found["cache_blocks"] == blocks == 2047
    whole, ragged = found["rooms"]
    assert whole == {
        "prompt_tokens": 1024, "left_alone": None, "blocks": 32, "blocks_compressed": 16,
        "blocks_left_alone": 0,
        "tokens": 63 * 1024, "tokens_compressed": 127 * 1024,
    }  # fmt: skip
    assert (ragged["blocks"], ragged["blocks_compressed"]) == (33, 17)  # one holds the tail


@pytest.mark.parametrize(("mode", "held"), [("evict", ""), ("mixed", "the bytes of ")])
def test_budgets_in_tokens_in_words(mode, held, capsys):
    budget = ("--kv-compression-config.decode_budget", "1024", "--kv-compression-config.mode", mode)
    assert main(["--model", str(MODEL), *budget]) == 0
    said = f"a request holds {held}1,024 tokens while it generates, and half as many more before"
    assert said in capsys.readouterr().out


def test_a_quality_loss_in_words(capsys):
    promise = ("--kv-compression-config.quality_loss", "0.02")
    assert main(["--model", str(MODEL), *promise]) == 0
    said = "evict, at most 0.75 of the KV pairs of a prompt are kept, and as few as cost 0.02 nats"
    assert said in capsys.readouterr().out


def test_blocks_of_pipeline_stages(capsys):
    """A stage's cache holds blocks of its own layers; the stage with the most has the fewest."""
    code, found = doctor(capsys, *STAGES, "--memory-gib", "0.25")
    assert code == 0
    assert found["compression"]["num_stages"] == 2
    assert found["compression"]["num_attention_layers"] == 4
    assert found["compression"]["profile"].endswith("tiny-retriever.json")
    assert found["cache_blocks"] == 2**28 // (2 * 4 * 2 * 32 * 32 * 4) - 1
    assert main(["--model", str(MODEL), *STAGES]) == 0
    assert "4 of 4 layers in 2 pipeline stages, 4 KV heads of size 32" in capsys.readouterr().out


def test_layers_that_stages_share_unevenly(capsys, monkeypatch):
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    _, found = doctor(capsys, *STAGES, "--memory-gib", "0.25")
    assert found["cache_blocks"] == 2**28 // (3 * 4 * 2 * 32 * 32 * 4) - 1


def test_layers_that_differ_and_pipeline_stages(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXED))
    code = main(["--model", str(tmp_path), "--skip-tokenizer-init", *STAGES])
    assert code == 1
    assert "--pipeline-parallel-size 2 for models whose layers differ" in capsys.readouterr().out


def test_bytes_of_quantized_pages_count(capsys):
    settings = [f"{SETTING}mode", "mixed", f"{SETTING}keep_bytes_ratio", "0.125"]
    code, found = doctor(capsys, *settings, "--prompt-tokens", "1024")
    assert code == 0
    assert found["compression"]["counts"] == "bytes"
    assert found["rooms"][0]["blocks_compressed"] == 4


def test_start_ups_warnings_and_prompts_that_are_left_alone(capsys):
    other = ["--hf-overrides", '{"num_hidden_layers": 3}']  # which has no profile
    code = main(["--model", str(MODEL), *other, "--prompt-tokens", "100"])
    shown = capsys.readouterr().out
    assert code == 0
    assert shown.startswith("It will start.\n")
    assert "scorer      contrast, budget adaptive" in shown
    assert "Computed, not measured: a KV cache of 1 GiB a rank" in shown
    assert "warning: No head profile matches this model, so scorer contrast chooses" in shown
    assert "warning: Prompts of 100 tokens are left alone: below_min_prompt_tokens." in shown


SLIDING, FULL = "sliding_attention", "full_attention"
MIXED = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 512,
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 16384, "use_sliding_window": True,
    "sliding_window": 256, "num_hidden_layers": 6, "layer_types": [SLIDING, SLIDING, FULL] * 2,
}  # fmt: skip


def test_a_model_whose_layers_differ(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXED))
    flags = ["--model", str(tmp_path), "--skip-tokenizer-init", "--memory-gib", "0.25"]
    code, found = doctor(capsys, *flags, "--prompt-tokens", "1024")
    assert code == 0
    compression = found["compression"]
    assert compression["compressed_layers"] == [2, 5]
    assert compression["left_alone"] == {SLIDING: 4} and compression["window"] == 256
    window = 256 // 32 + 1
    assert compression["shares"] == {
        "8192": 256 / (256 + 2 * window), "16384": 512 / (512 + 2 * window)
    }  # fmt: skip
    blocks = 2**28 // (2 * 4 * 2 * 32 * 32 * 4) - 1  # a block holds two layers of any group
    assert found["cache_blocks"] == blocks == 4095
    assert found["rooms"] == [
        {
            "prompt_tokens": 1024, "left_alone": None, "blocks": 32 + 2 * window,
            "blocks_compressed": 16 + 2 * window, "blocks_left_alone": 2 * window,
            "tokens": 4095 // 50 * 1024, "tokens_compressed": 4095 // 34 * 1024,
        }
    ]  # fmt: skip


def test_layers_that_are_left_alone_in_words(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MIXED))
    flags = ["--model", str(tmp_path), "--skip-tokenizer-init"]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "compressed  2 of 6 layers, 4 KV heads of size 32: full attention\n" in shown
    assert "others      4 have a sliding window of 256 tokens; they are left to vLLM\n" in shown
    assert "of an uncompressed request, by its tokens: 93% at 8,192, 97% at 16,384\n" in shown
    assert main([*flags, "--max-model-len", "256"]) == 0
    shown = capsys.readouterr().out
    assert "6 of 6 layers, 4 KV heads of size 32: full attention, a window of 256 tokens" in shown
    assert "others" not in shown


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--block-size", "16"], "does not support --block-size 16 on the CPU; use a multiple"),
        (
            [*STAGES, "--enforce-eager"],
            "does not support --pipeline-parallel-size 2 with --enforce-eager on the CPU",
        ),
        ([f"{SETTING}keep_ratio", "7"], "keep_ratio=7 is wrong"),
        ([f"{SETTING}keep_ration", "0.3"], "did you mean keep_ratio?"),
        ([f"{SETTING}scorer", "best"], "scorer: "),
        (["--model", "/no/such/model"], "vLLM refuses it: "),
    ],
)
def test_a_refusal_is_one_sentence(capsys, arguments, sentence):
    code, found = doctor(capsys, *arguments)
    assert code == 1
    assert not found["starts"]
    assert sentence in found["refusal"] and "\n" not in found["refusal"]
    assert found["compression"] is None


def test_a_flag_that_vllm_does_not_know(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(MODEL), "--no-such-flag"])
    assert stopped.value.code == 2
    assert "no-such-flag" in capsys.readouterr().err
