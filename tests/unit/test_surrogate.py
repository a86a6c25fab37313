"""The surrogate's file: what comes back, what is refused, and what the shipped one is worth."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from engine_job import MODEL
from safetensors.torch import save_file

from vllm_kvzip.errors import ProfileError
from vllm_kvzip.evaluation.tasks.retrieval_task import VOCABULARY, make_context
from vllm_kvzip.head_profiles.head_profile import ModelFingerprint, find_profile, profile_folders
from vllm_kvzip.head_profiles.network_training import SurrogateTrainer, predict
from vllm_kvzip.head_profiles.networks import (
    LayerSurrogate,
    load_surrogate,
    save_surrogate,
    token_features,
)
from vllm_kvzip.profiling.context_cache import layers_of
from vllm_kvzip.profiling.probe_rotary import rotary_of
from vllm_kvzip.profiling.reconstruction_probe import ReconstructionProbe

SHAPE = ModelFingerprint(
    architecture="A", num_layers=2, num_query_heads=4, num_kv_heads=2, head_dim=4
)


def networks(width=3):
    torch.manual_seed(0)
    return [
        LayerSurrogate(
            torch.randn(2, 11, width), torch.randn(2, width), torch.randn(2, width), torch.randn(2)
        )
        for _ in range(2)
    ]


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "new" / "a.safetensors"
    save_surrogate(path, networks(), SHAPE, {"texts": "a book"})
    for got, wanted in zip(load_surrogate(path, SHAPE), networks(), strict=True):
        for part in ("mix", "mix_bias", "out", "out_bias"):
            assert torch.equal(getattr(got, part), getattr(wanted, part))


def test_features_hold_a_heads_own_key_and_value_token_by_token():
    keys, values = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    features = token_features(keys, values)
    for head, token in product(range(2), range(5)):
        wanted = torch.cat([keys[head, token], values[head, token]])
        assert torch.equal(features[head, token, :8], wanted)
        recency = [math.exp(-(4 - token) / length) for length in (16, 64, 256)]
        assert features[head, token, 8:].tolist() == pytest.approx(recency)


def test_both_ways_to_compute_are_one():
    keys, values = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    wanted = networks()[0].log_scores(token_features(keys, values))
    torch.testing.assert_close(networks()[0].log_scores_of(keys, values), wanted)


def test_wrong_files_are_one_sentence(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ProfileError, match="build it with `vllm-kvzip profile`"):
        load_surrogate(path)
    path.write_bytes(b"no tensors")
    with pytest.raises(ProfileError, match="no surrogate that can be read"):
        load_surrogate(path)
    save_file({"a": torch.zeros(1)}, path, {"schema_version": "7"})
    with pytest.raises(ProfileError, match="its schema_version is '7'"):
        load_surrogate(path)
    save_surrogate(path, networks()[:1], SHAPE, {})
    with pytest.raises(ProfileError, match=r"layers\.1\.mix"):
        load_surrogate(path)
    save_surrogate(path, networks(), SHAPE, {})
    other = SHAPE.model_copy(update={"head_dim": 8})
    with pytest.raises(ProfileError, match="its head_dim is 4, the running model's is 8"):
        load_surrogate(path, other)
    save_surrogate(path, networks(), other, {})
    with pytest.raises(ProfileError, match="no 2 networks a layer that read 19 numbers"):
        load_surrogate(path)


def agreement(layers, cache, scores, rotary, keep_ratio):
    """Share of the best KV pairs of one context, over all layers and heads, that are chosen."""
    count = max(1, round(keep_ratio * scores.numel()))
    best = scores.flatten().topk(count).indices
    chosen = predict(layers, cache, rotary).flatten().topk(count).indices
    return float(torch.isin(chosen, best).float().mean())


def test_training_finds_scores_that_the_features_tell():
    """Scores that are a function of keys and values: the fit must find it."""

    keys, values = torch.randn(2, 900, 4), torch.randn(2, 900, 4)
    scores = torch.sigmoid(2 * keys[:, :, 0] + values[:, :, 2])[None]
    trainer = SurrogateTrainer(1, 800, width=8, seed=0)
    trainer.add([(keys, values)], [scores], None)
    assert agreement(trainer.fit(), [(keys, values)], scores, None, keep_ratio=0.3) > 0.93


def test_kinds_of_scores_are_fitted_each_by_itself():
    """Beside another kind, and whatever was fitted before, the same networks come out."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 300, 4), torch.randn(2, 300, 4)
    kinds = [torch.sigmoid(keys[None, :, :, place]) for place in (0, 3)]
    both = SurrogateTrainer(1, 200, width=4, seed=0, floors=[-6.0, -7.0])
    both.add([(keys, values)], kinds, None)
    for kind, floor in ((1, -7.0), (0, -6.0), (1, -7.0)):
        alone = SurrogateTrainer(1, 200, width=4, seed=0, floors=[floor])
        alone.add([(keys, values)], [kinds[kind]], None)
        (expected,), (found,) = alone.fit(), both.fit(shares={kind: 1.0})
        assert torch.equal(found.mix, expected.mix) and torch.equal(found.out, expected.out)


def test_one_network_learns_what_two_kinds_of_scores_say():
    """A pair that either kind needs is kept, in whatever unit the kinds are."""
    torch.manual_seed(0)
    keys, values = torch.randn(2, 900, 4), torch.randn(2, 900, 4)
    kinds = [(4 * keys[None, :, :, place]).exp() for place in (0, 3)]
    kinds[1] *= 1e-3
    wanted = sum(kind.square() / kind.square().mean() for kind in kinds).sqrt()
    trainer = SurrogateTrainer(1, 800, width=8, seed=0, floors=[-7.0, -7.0])
    trainer.add([(keys, values)], kinds, None)
    shares = [
        agreement(trainer.fit(shares=number), [(keys, values)], wanted, None, 0.1)
        for number in ({0: 0.5, 1: 0.5}, {0: 1.0}, {1: 1.0})
    ]
    assert shares[0] > 0.65 and max(shares[1:]) < 0.6, shares


def test_the_shipped_networks_choose_what_kvzip_chooses():
    probe = ReconstructionProbe(str(MODEL))
    path = find_profile(probe.fingerprint, profile_folders())
    layers = load_surrogate(path.with_suffix(".safetensors"), probe.fingerprint)
    context = make_context(np.random.default_rng(77), 1024).tokens.tolist()
    repeat = [VOCABULARY.ids["repeat"]]
    cache = probe.read(context)
    scores = probe.score(context, 512, repeat, repeat, cache=cache)
    rotary = rotary_of(probe.model, len(context))
    shares = [agreement(layers, layers_of(cache), scores, rotary, ratio) for ratio in (0.2, 0.3)]
    assert min(shares) > 0.85  # by chance 0.2 and 0.3
