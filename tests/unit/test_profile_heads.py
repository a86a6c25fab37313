"""The profiling script on a fresh random model: valid files, right scores, clear errors."""

import json
import re
import shutil

import numpy as np
import profile_heads
import pytest
import torch
import train_tiny_model
from engine_job import MODEL
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    FalconConfig,
    MistralConfig,
    OPTConfig,
    Qwen3Config,
)

from vllm_kvzip.head_profiles import network_training as surrogate_training
from vllm_kvzip.head_profiles.head_profile import load_profile
from vllm_kvzip.head_profiles.influence import influence_scores, log_odds
from vllm_kvzip.head_profiles.networks import load_surrogate
from vllm_kvzip.planning.reconstruction import iter_chunks
from vllm_kvzip.profiling import reconstruction_probe
from vllm_kvzip.profiling.reconstruction_probe import ReconstructionProbe


@pytest.fixture(scope="module")
def random_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "random-llama"
    arguments = train_tiny_model.parse_args(
        ["--out", str(folder), "--layers", "2", "--hidden", "64", "--heads", "4", "--kv-heads", "2"]
    )
    torch.manual_seed(0)
    train_tiny_model.save(train_tiny_model.build_model(arguments), {}, folder)
    return folder


def test_profile_is_written_with_its_picture(random_model, tmp_path, capsys):
    out = tmp_path / "random-llama.json"
    code = profile_heads.main(
        ["--model", str(random_model), "--out", str(out), "--task", "retrieval", "--num-contexts",
         "2", "--context-tokens", "96", "--chunk-tokens", "40", "--repeat-prompt", "repeat",
         "--no-surrogate"]
    )  # fmt: skip
    assert code == 0
    profile = load_profile(out)
    assert profile.model.num_kv_heads == 2
    assert profile.provenance.repeat_prompt == "repeat"
    assert profile.provenance.repeated_share < 0.1  # it was never trained
    assert "warning: the model hardly repeats the contexts" in capsys.readouterr().err
    for ratio, grid in profile.budgets.items():
        assert np.mean(grid) == pytest.approx(float(ratio), abs=0.01)
    tiers = profile.tiers
    assert tiers.token_bytes == pytest.approx(16 / 60, abs=0.001)
    assert 0.05 < tiers.loss < 0.15
    for (held, kept, share), grid in zip(tiers.shares(), tiers.kept.values(), strict=True):
        assert np.mean(grid) == pytest.approx(kept)
        assert kept * (share + (1 - share) * tiers.token_bytes) <= held + 0.02 or kept == 1
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_a_model_that_repeats_is_not_warned_about(tmp_path, capsys):
    out = tmp_path / "a.json"
    code = profile_heads.main(
        ["--model", str(MODEL), "--out", str(out), "--task", "retrieval", "--num-contexts", "1",
         "--context-tokens", "512", "--repeat-prompt", "repeat", "--no-surrogate"]
    )  # fmt: skip
    assert code == 0
    shown = capsys.readouterr()
    assert load_profile(out).provenance.repeated_share > 0.9
    assert "warning" not in shown.err
    assert json.loads(shown.out.splitlines()[-1])["profile"] == str(out)


def test_networks_are_written_beside_the_profile(random_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(surrogate_training, "STEPS", 20)
    out = tmp_path / "random-llama.json"
    code = profile_heads.main(
        ["--model", str(random_model), "--out", str(out), "--task", "retrieval", "--num-contexts",
         "2", "--context-tokens", "96", "--repeat-prompt", "repeat", "--surrogate-width", "5",
         "--following-share", "0.1", "--loss-contexts", "3"]
    )  # fmt: skip
    assert code == 0
    layers = load_surrogate(out.with_suffix(".safetensors"), load_profile(out).model)
    assert [tuple(layer.mix.shape) for layer in layers] == [(2, 67, 5)] * 2
    shown = capsys.readouterr().out
    assert shown.count("surrogate trained on ") == 2
    taken = re.search(r"surrogate trained on (\w+): .* \(taken\)", shown).group(1)
    assert load_profile(out).provenance.method.endswith(f"networks by {taken}")
    assert load_profile(out).provenance.following_tokens == 48


def test_networks_need_a_context_to_be_tried_on(random_model):
    with pytest.raises(SystemExit):
        profile_heads.main(["--model", str(random_model), "--num-contexts", "1"])


@torch.inference_mode()
def test_queries_that_are_scaled_before_are_not_scaled_again(tmp_path):
    """OPT: its own attention module names a scale that its queries have got already."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, ffn_dim=64,
        max_position_embeddings=64, word_embed_proj_dim=64, init_std=0.5,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    context, prompt = list(range(5, 15)), [3]
    scores = ReconstructionProbe(str(tmp_path)).score(context, 16, prompt, prompt)
    ids = torch.tensor([[*context, *prompt, *context]])
    weights = model(ids, output_attentions=True).attentions[0][0]  # [H, T, T]
    wanted = weights[:, len(context) :, : len(context)].amax(dim=1)
    torch.testing.assert_close(scores[0], wanted, atol=1e-5, rtol=1e-4)


def test_scores_equal_attention_of_the_whole_model(random_model):
    """Against transformers' own eager attention weights, cut and normalised by hand."""
    probe = ReconstructionProbe(str(random_model), num_sinks=2)
    rng = np.random.default_rng(0)
    context, prompt = rng.integers(7, 512, 30).tolist(), [6]
    got = probe.score(context, 16, prompt, prompt)
    probe.model.set_attn_implementation("eager")
    for chunk in iter_chunks(context, 16, prompt, prompt):
        ids = torch.tensor([context + chunk.input_ids])
        with torch.inference_mode():
            weights = probe.model(ids, output_attentions=True).attentions
        sinks = min(2, chunk.start)
        columns = [*range(sinks), *range(chunk.start, chunk.end), *range(30, ids.shape[1])]
        for layer, attention in enumerate(weights):
            cut = attention[0, :, 30:, columns]
            cut = cut / cut.sum(-1, keepdim=True)
            best = cut[:, :, sinks : sinks + chunk.end - chunk.start].amax(1)
            wanted = best.unflatten(0, (2, -1)).amax(1)
            torch.testing.assert_close(
                got[layer, :, chunk.start : chunk.end], wanted, atol=1e-5, rtol=1e-4
            )


def test_influence_goes_back_through_the_whole_model(random_model, monkeypatch):
    """The gradients at a head's output, against log odds after that output was moved a little."""
    caught = []

    def watched(*args):
        caught.append(args)
        return influence_scores(*args)

    monkeypatch.setattr(reconstruction_probe, "influence_scores", watched)
    probe = ReconstructionProbe(str(random_model))
    rng = np.random.default_rng(0)
    context, prompt = rng.integers(7, 512, 30).tolist(), [6]
    scores = probe.influence(context, 16, prompt, prompt)
    assert scores.shape == (2, 2, 30)
    assert scores.isfinite().all() and (scores > 0).all()
    assert len(caught) == 4  # two chunks of two layers
    chunk = list(iter_chunks(context, 16, prompt, prompt))[1]
    layer, head, row, step = 0, 3, 10, 1e-2
    _, _, _, outputs, gradients, *_, pairs = caught[2 + layer]
    assert pairs == slice(16, 30)
    direction = torch.randn(outputs.shape[-1], generator=torch.manual_seed(0))

    def moved(by):
        def move(module, inputs):
            own = inputs[0].clone()
            own.view(*own.shape[:2], outputs.shape[0], -1)[0, 30 + row, head] += by * direction
            return (own,)

        ids = torch.tensor([[*context, *chunk.input_ids]])
        projection = probe.model.model.layers[layer].self_attn.o_proj
        hook = projection.register_forward_pre_hook(move)
        try:
            with torch.inference_mode():
                logits = probe.model(ids).logits[0, -15:-1].double()
        finally:
            hook.remove()
        return float(log_odds(logits, torch.tensor(chunk.input_ids[-14:])).sum())

    wanted = (moved(step) - moved(-step)) / (2 * step)
    assert float(gradients[head, row] @ direction) == pytest.approx(wanted, rel=0.02, abs=1e-3)


def test_influence_further_on_is_that_of_the_text_that_follows(random_model):
    """From one pass over context and text together, and nothing without what follows."""
    probe = ReconstructionProbe(str(random_model))
    rng = np.random.default_rng(0)
    context, following = rng.integers(7, 512, 30).tolist(), rng.integers(7, 512, 20).tolist()
    found = probe.influence_further_on(context, following)
    ids = torch.tensor([*context, *following])
    embedded = probe.model.get_input_embeddings()(ids)[None].requires_grad_(True)
    probe._attended = {}
    logits = probe.model(inputs_embeds=embedded, use_cache=False).logits[0]
    torch.autograd.backward(log_odds(logits[30:-1], ids[31:]).sum())
    attended, probe._attended = probe._attended, None
    for row, (query, key, value, output, scale) in attended.items():
        outputs, gradients = (part[0, 30:].transpose(0, 1) for part in (output, output.grad))
        wanted = influence_scores(
            query[:, 30:], key, value, outputs.detach(), gradients, scale, slice(0, 30)
        )
        torch.testing.assert_close(found[row], wanted, rtol=1e-2, atol=1e-5)
    other = probe.influence_further_on(context, [*following[:10], *context[:10]])
    assert not torch.allclose(found, other, rtol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such/model"], "cannot be profiled: there is no such folder"),
        (["--out", "/"], "--out / cannot be written (it is a folder; name a file)"),
        (["--context-tokens", "100000000"], "fewer than the 100000000 that a context needs"),
        (["--repeat-prompt", " ", "--task", "retrieval"], "--repeat-prompt ' ' has no token"),
        (["--text", "/no/such/text"], "Calibration text /no/such/text cannot be read"),
    ],
)
def test_wrong_input_is_one_sentence(random_model, tmp_path, capsys, arguments, message):
    code = profile_heads.main(
        ["--model", str(random_model), "--out", str(tmp_path / "x.json"), *arguments]
    )
    errors = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert code == 2
    assert len(errors) == 1 and message in errors[0]
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DeepseekV3Config(), "multi-head latent attention (MLA)"),
        (
            MistralConfig(sliding_window=512),
            "sliding_window=512; set --context-tokens to 512 or less, or choose another model",
        ),
        (Qwen3Config(num_hidden_layers=1, layer_types=["sliding_attention"]), "sliding_attention"),
        (
            Qwen3Config(num_hidden_layers=2, layer_types=["chunked_attention", "full_attention"]),
            "KV compression does not support its layers of chunked_attention; choose another model",
        ),
        (
            Qwen3Config(num_hidden_layers=1, layer_types=["linear_attention"]),
            "none of its layers attends to the whole context; choose another model",
        ),
        (Qwen3Config(attn_logit_softcapping=30.0), "capped attention logits; let the engine"),
        (Qwen3Config(attention_sinks=True), "learned attention sinks; let the engine profile it"),
    ],
)
def test_models_without_whole_kv_heads_are_refused(tmp_path, capsys, config, message):
    config.save_pretrained(tmp_path / "model")
    code = profile_heads.main(
        ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.json")]
    )
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_a_model_with_attention_of_its_own_is_sent_to_the_engine(tmp_path, capsys):
    FalconConfig().save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "x.json")]
    assert profile_heads.main(arguments) == 2
    shown = capsys.readouterr().err
    assert "the attention of FalconForCausalLM; let the engine profile it" in shown


def test_a_configuration_without_architectures_is_refused(random_model, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert profile_heads.main(["--model", str(folder), "--out", str(tmp_path / "x.json")]) == 2
    assert "its config.json names no architectures" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_profile_that_is_there_is_kept(random_model, tmp_path, capsys, suffix):
    there = tmp_path / f"mine{suffix}"
    there.write_text("mine")
    arguments = ["--model", str(random_model), "--out", str(tmp_path / "mine.json")]
    arguments += ["--task", "retrieval", "--num-contexts", "1", "--context-tokens", "64"]
    arguments += ["--repeat-prompt", "repeat", "--no-surrogate"]
    assert profile_heads.main(arguments) == 2
    assert f"{there} is there already" in capsys.readouterr().err
    assert there.read_text() == "mine"
    assert profile_heads.main([*arguments, "--overwrite"]) == 0
    assert load_profile(tmp_path / "mine.json").model.num_kv_heads == 2


def test_a_window_that_holds_the_context_slides_nowhere(random_model, tmp_path):
    """The same weights with a window: what is repeated lies beyond it and sees everything."""
    folder = tmp_path / "model"
    shutil.copytree(random_model, folder)
    changed = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    config = json.loads((folder / "config.json").read_text()) | changed | {"sliding_window": 64}
    (folder / "config.json").write_text(json.dumps(config))
    arguments = ["--task", "retrieval", "--num-contexts", "1", "--repeat-prompt", "repeat"]
    arguments += ["--context-tokens", "64", "--no-surrogate"]
    profiles = []
    for model in (random_model, folder):
        out = tmp_path / f"{model.name}.json"
        assert profile_heads.main(["--model", str(model), "--out", str(out), *arguments]) == 0
        profiles.append(load_profile(out))
    np.testing.assert_allclose(profiles[0].importance, profiles[1].importance, rtol=1e-4)
    arguments[-2] = "65"
    out = tmp_path / "65.json"
    assert profile_heads.main(["--model", str(folder), "--out", str(out), *arguments]) == 2


@pytest.mark.parametrize(("model", "name"), [(".", "random-llama"), ("../link", "link")])
def test_models_are_named_after_the_folder_as_given(
    random_model, tmp_path, monkeypatch, model, name
):
    link = random_model.parent / "link"
    if not link.exists():
        link.symlink_to(random_model)
    monkeypatch.chdir(random_model)
    out = tmp_path / "x.json"
    arguments = ["--model", model, "--out", str(out), "--task", "retrieval", "--num-contexts", "1"]
    assert profile_heads.main([*arguments, "--no-surrogate", "--context-tokens", "32"]) == 0
    assert load_profile(out).model.name == name


def test_layers_that_show_no_attention_are_refused(random_model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ReconstructionProbe, "score", lambda *_, **__: torch.zeros(2, 2, 32))
    arguments = ["--model", str(random_model), "--out", str(tmp_path / "x.json")]
    task = ["--task", "retrieval", "--num-contexts", "2", "--context-tokens", "32"]
    assert profile_heads.main([*arguments, *task]) == 2
    assert "some layers show no attention" in capsys.readouterr().err
