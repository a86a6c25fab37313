"""Profiles of models of which some layers have a sliding window or a state: full layers only."""

import re
import shutil

import numpy as np
import profile_heads
import pytest
import torch
from engine_job import MODEL
from random_model import KINDS, make_random_model

from vllm_kvzip.head_profiles import network_training
from vllm_kvzip.head_profiles.head_profile import load_profile
from vllm_kvzip.head_profiles.influence import log_odds
from vllm_kvzip.head_profiles.networks import load_surrogate
from vllm_kvzip.planning.reconstruction import iter_chunks
from vllm_kvzip.profiling import context_cache
from vllm_kvzip.profiling.masked_model import MaskedModel
from vllm_kvzip.profiling.probe_rotary import rotary_of

WITHOUT_ROTATION = ("cohere2", "exaone4", "granite4-h", "nemotron-h")
"""Full attention of these has none, though sliding windows of the first two have."""
WITH_STATES = ("lfm2", "qwen3-next", "granite4-h", "nemotron-h")
TO_THE_ENGINE = ("gemma2", "gpt-oss")
"""Kinds whose attention transformers cannot run here."""
CONTEXT, CHUNK, PROMPT = 150, 90, [6, 9]


@pytest.fixture(scope="module", params=[kind for kind in KINDS if kind not in TO_THE_ENGINE])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tmp_path_factory):
    made = make_random_model(kind, tmp_path_factory.mktemp("models"))
    for file in MODEL.glob("tokenizer*"):
        shutil.copy(file, made)
    return made


@pytest.fixture(scope="module")
def probe(folder):
    return MaskedModel(str(folder), num_sinks=2)


@pytest.fixture(scope="module")
def context():
    return np.random.default_rng(0).integers(7, 500, CONTEXT).tolist()


def full_layers(kind):
    types = KINDS[kind].fields["layer_types"]
    return [n for n, layer in enumerate(types) if layer in ("full_attention", "attention")]


def test_scores_are_of_the_full_layers_of_the_whole_model(kind, probe, context, monkeypatch):
    """Against one pass over context and repeated text together, with nothing cached."""
    scores = probe.score(context, CHUNK, PROMPT, PROMPT)
    assert probe.scored == full_layers(kind)
    assert scores.shape == (len(probe.scored), 2, CONTEXT)
    seen = {}

    def watch(module, query, key, value, *args, **kwargs):
        seen[module.layer_idx] = query[0], key[0], kwargs["scaling"]
        return attend(module, query, key, value, *args, **kwargs)

    attend = probe._attend
    from transformers import AttentionInterface

    name = probe.model.config._attn_implementation
    monkeypatch.setitem(AttentionInterface._global_mapping, name, watch)
    for chunk in iter_chunks(context, CHUNK, PROMPT, PROMPT):
        with torch.inference_mode():
            probe.model(torch.tensor([[*context, *chunk.input_ids]]), use_cache=False)
        sinks = min(2, chunk.start)
        columns = [*range(sinks), *range(chunk.start, chunk.end)]
        columns += range(CONTEXT, CONTEXT + len(chunk.input_ids))
        for row, layer in enumerate(probe.scored):
            query, key, scale = seen[layer]
            group = len(query) // len(key)
            logits = query @ key.repeat_interleave(group, 0).transpose(1, 2) * scale
            future = torch.ones(logits.shape[1:], dtype=torch.bool).triu(1)
            logits = logits.masked_fill(future, float("-inf"))[:, CONTEXT:, columns]
            best = logits.softmax(-1)[..., sinks : sinks + chunk.end - chunk.start].amax(1)
            torch.testing.assert_close(
                scores[row, :, chunk.start : chunk.end],
                best.unflatten(0, (2, group)).amax(1),
                atol=2e-4,
                rtol=1e-2,
            )


def test_influence_is_that_of_the_whole_model(probe, context, monkeypatch):
    """Queries and gradients against those of one pass over context and repeated text together."""
    found, whole = [], []
    from vllm_kvzip.profiling import reconstruction_probe

    def watched(*args):
        found.append(args)
        return torch.zeros(2, CONTEXT)

    monkeypatch.setattr(reconstruction_probe, "influence_scores", watched)
    probe.influence(context, CONTEXT, PROMPT, PROMPT)
    (chunk,) = iter_chunks(context, CONTEXT, PROMPT, PROMPT)
    ids = torch.tensor([[*context, *chunk.input_ids]])
    probe._attended = {}
    embedded = probe.model.get_input_embeddings()(ids).requires_grad_(True)
    logits = probe.model(inputs_embeds=embedded, use_cache=False).logits[0, CONTEXT:]
    asked = torch.tensor(chunk.input_ids[-CONTEXT:])
    torch.autograd.backward(log_odds(logits[-CONTEXT - 1 : -1], asked).sum())
    for row in range(len(probe.scored)):
        attended = probe._attended[row]
        whole.append((attended.query[:, CONTEXT:], attended.output.grad[0, CONTEXT:]))
    probe._attended = None
    for (query, gradient), args in zip(whole, found, strict=True):
        for wanted, got in ((query, args[0]), (gradient.transpose(0, 1), args[4])):
            assert float((got - wanted).norm()) < 1e-2 * float(wanted.norm())


def test_reading_and_scoring_leave_a_cache_as_it_is(probe, context):
    cache = probe.read(context)
    before = context_cache.copy_of(cache, probe.scored)
    first = probe.score(context, CHUNK, PROMPT, PROMPT, cache=cache)
    probe.influence(context, CHUNK, PROMPT, PROMPT, cache=cache)
    assert torch.equal(first, probe.score(context, CHUNK, PROMPT, PROMPT, cache=cache))
    for left, right in zip(before.layers, cache.layers, strict=True):
        if hasattr(right, "recurrent_states"):  # a layer without attention has none in them
            for own, other in zip(*(x.conv_states.values() for x in (left, right)), strict=True):
                assert own is other is None or torch.equal(own, other)
        else:
            assert torch.equal(left.keys, right.keys)


def test_keys_are_turned_back_as_the_full_layers_turned_them(kind, probe):
    tables = rotary_of(probe.model, 40, probe.scored)
    if kind in WITHOUT_ROTATION:
        assert tables is None
        return
    token = torch.full((1, 40), 9)
    positions = torch.arange(40)
    for layer in probe.scored:
        keys = []
        for position in (0, 17, 39):
            with torch.inference_mode():
                cache = probe.model(
                    token[:, :1], position_ids=positions[None, position : position + 1],
                    use_cache=True,
                ).past_key_values  # fmt: skip
            turned = cache.layers[layer].keys[0].float()
            keys.append(tables.unrotate(turned, positions[position : position + 1]))
        for key in keys[1:]:
            torch.testing.assert_close(key, keys[0], atol=1e-3, rtol=1e-3)


def test_profile_has_a_row_for_each_full_layer(kind, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(network_training, "STEPS", 20)
    out = tmp_path / "mixed.json"
    code = profile_heads.main(
        ["--model", str(folder), "--out", str(out), "--task", "retrieval", "--num-contexts", "2",
         "--context-tokens", "128", "--repeat-prompt", "repeat", "--surrogate-width", "4",
         "--loss-contexts", "0"]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert re.findall(r"^layer +(\d+)", shown, re.M) == list(map(str, full_layers(kind)))
    profile = load_profile(out)
    assert profile.model.num_layers == len(full_layers(kind)) == len(profile.importance)
    assert len(profile.tiers.kept["0.25"]) == profile.model.num_layers
    networks = load_surrogate(out.with_suffix(".safetensors"), profile.model)
    assert len(networks) == profile.model.num_layers


def test_answers_from_everything_are_the_models_own(probe, context):
    """Also when the context ends inside what is kept: windows and states are read again."""
    from vllm_kvzip.evaluation.tasks.documents import Document, Question

    document = Document(context, [Question([11, 12], [3, 4, 5]), Question([13, 14], [6, 7, 8])])
    cache = probe.read(context)
    wanted, _ = probe.nats(document, cache, None)
    for boundary in (CONTEXT, CONTEXT - 30):
        kept = torch.ones(len(probe.scored), 2, boundary, dtype=torch.bool)
        got, count = probe.nats(document, cache, kept)
        assert count == 6
        assert got == pytest.approx(wanted, rel=1e-3)
        half = kept.clone()
        half[:, :, 10:80] = False
        assert abs(probe.nats(document, cache, half)[0] - wanted) > 1e-3


@pytest.mark.parametrize("kind", WITH_STATES, indirect=True)
def test_states_that_do_not_go_on_are_refused(probe, folder, tmp_path, capsys, monkeypatch):
    """As some models of transformers do: what is read after a context starts from nothing."""

    def lost(layer, batch):
        made = kept(layer, batch)
        for states in (made.conv_states, made.recurrent_states):
            for state in states.values():
                if state is not None:
                    state.zero_()
        return made

    kept = context_cache._copy_states
    monkeypatch.setattr(context_cache, "_copy_states", lost)
    code = profile_heads.main(
        ["--model", str(folder), "--out", str(tmp_path / "x.json"), "--task", "retrieval",
         "--context-tokens", "128", "--no-surrogate"]
    )  # fmt: skip
    assert code == 2
    assert "do not go on from the state that a context leaves; run it with" in (
        capsys.readouterr().err
    )
