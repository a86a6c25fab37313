"""Scorers against what their papers say, written out the slow way."""

import math
from dataclasses import replace

import pytest
import torch

from vllm_kvzip.head_profiles.head_profile import ModelFingerprint
from vllm_kvzip.head_profiles.networks import LayerSurrogate, save_surrogate
from vllm_kvzip.layer_inputs import LayerInputs
from vllm_kvzip.model.rotary import RotaryTables
from vllm_kvzip.registry import SCORERS
from vllm_kvzip.scoring import (
    Scorer,
    ScorerSettings,
    available_scorers,
    create_scorer,
    register_scorer,
    scorer_class,
)
from vllm_kvzip.scoring.redundancy import novelty

HEADS, TOKENS, DIM, GROUP = 2, 12, 8, 3


def layer_inputs(num_queries=0, num_context_tokens=14, **changes):
    generator = torch.Generator().manual_seed(1)
    queries = None
    if num_queries:
        queries = torch.randn(num_queries, HEADS, GROUP, DIM, generator=generator)
    values = {
        "layer": 1,
        "num_layers": 3,
        "keys": torch.randn(HEADS, TOKENS, DIM, generator=generator),
        "values": torch.randn(HEADS, TOKENS, DIM, generator=generator),
        "observation_queries": queries,
        "num_context_tokens": num_context_tokens,
        "reconstruction": torch.rand(HEADS, TOKENS),
        "rotary": None,
        "scale": DIM**-0.5,
        "sink_tokens": 2,
        "recent_tokens": 2,
        "seed": 5,
    }
    return LayerInputs(**{**values, **changes})


@pytest.fixture
def settings(tmp_path):
    """Settings with random networks for the model of :func:`layer_inputs`."""
    model = ModelFingerprint(
        architecture="A", num_layers=3, num_query_heads=6, num_kv_heads=HEADS, head_dim=DIM
    )
    layers = [
        LayerSurrogate(
            torch.randn(HEADS, 2 * DIM + 3, 4),
            torch.randn(HEADS, 4),
            torch.randn(HEADS, 4),
            torch.zeros(HEADS),
        )
        for _ in range(3)
    ]
    save_surrogate(tmp_path / "a.safetensors", layers, model, {})
    return ScorerSettings(surrogate=str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("rotary", [None, RotaryTables(torch.rand(20, 4), torch.rand(20, 4))])
@pytest.mark.parametrize("name", available_scorers())
def test_every_scorer_returns_finite_scores_and_leaves_its_inputs_alone(name, settings, rotary):
    inputs = layer_inputs(num_queries=5, rotary=rotary, keep_ratio=0.05)
    before = inputs.keys.clone(), inputs.values.clone(), inputs.observation_queries.clone()
    scores = create_scorer(name, settings).score_layer(inputs)
    assert scores.shape == (HEADS, TOKENS)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert len(scores.unique()) > 1
    after = inputs.keys, inputs.values, inputs.observation_queries
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_keydiff_prefers_keys_unlike_the_others():
    keys = torch.ones(1, 6, 4)
    keys[0, 3] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    scores = create_scorer("keydiff").score_layer(layer_inputs(keys=keys))
    assert scores[0].argmax() == 3
    inputs = layer_inputs()
    unit = [[key / key.norm() for key in head] for head in inputs.keys]
    for head in range(HEADS):
        anchor = sum(unit[head]) / TOKENS
        wanted = [-torch.dot(key, anchor / anchor.norm()).item() for key in unit[head]]
        got = create_scorer("keydiff").score_layer(inputs)[head].tolist()
        assert got == pytest.approx(wanted, abs=1e-5)


def test_knorm_prefers_small_keys():
    inputs = layer_inputs()
    scores = create_scorer("knorm").score_layer(inputs)
    assert scores.argmax(-1).tolist() == inputs.keys.norm(dim=-1).argmin(-1).tolist()


def test_streaming_prefers_the_most_recent():
    scores = create_scorer("streaming").score_layer(layer_inputs())
    assert (scores.diff(dim=-1) > 0).all()


def test_random_depends_on_prompt_and_layer_only():
    random = create_scorer("random")
    first = random.score_layer(layer_inputs())
    assert torch.equal(first, random.score_layer(layer_inputs(keys=torch.zeros(2, 12, 8))))
    assert not torch.equal(first, random.score_layer(layer_inputs(seed=6)))
    assert not torch.equal(first, random.score_layer(layer_inputs(layer=2)))


@pytest.mark.parametrize(
    "terms", [{}, {"soft_cap": 0.8}, {"sink_logits": torch.linspace(-2, 3, 6).view(HEADS, GROUP)}]
)
def test_window_is_causal_attention_of_the_last_queries(terms):
    inputs = layer_inputs(num_queries=5, **terms)  # queries at 9..13, keys at 0..11
    raw = torch.zeros(HEADS, TOKENS)
    for head in range(HEADS):
        groups = []
        for member in range(GROUP):
            total = torch.zeros(TOKENS)
            for index in range(5):
                query = inputs.observation_queries[index, head, member]
                visible = [t for t in range(TOKENS) if t <= 9 + index]
                logits = [float(query @ inputs.keys[head, t]) * inputs.scale for t in visible]
                if (cap := inputs.soft_cap) is not None:
                    logits = [cap * math.tanh(logit / cap) for logit in logits]
                weights = [math.exp(logit) for logit in logits]
                whole = sum(weights)
                if inputs.sink_logits is not None:
                    whole += math.exp(float(inputs.sink_logits[head, member]))
                for t, weight in zip(visible, weights, strict=True):
                    total[t] += weight / whole / 5
            groups.append(total)
        raw[head] = torch.stack(groups).amax(0)
    padded = torch.nn.functional.pad(raw, (2, 2), value=0.0)
    wanted = torch.stack([padded[:, t : t + 5].amax(-1) for t in range(TOKENS)], dim=-1)
    torch.testing.assert_close(create_scorer("window").score_layer(inputs), wanted)


@pytest.mark.parametrize("sink_logits", [None, torch.linspace(-2, 3, 6).view(HEADS, GROUP)])
def test_expected_attention_is_that_of_many_drawn_queries(sink_logits):
    """Draw queries like the last ones, rotate them to later positions, attend: the mean of that."""
    torch.manual_seed(0)
    angles = torch.arange(600.0)[:, None] * torch.tensor([0.3, 0.1, 0.02, 0.0])
    rotary = RotaryTables(angles.cos(), angles.sin())
    inputs = layer_inputs(num_queries=9, rotary=rotary, sink_logits=sink_logits)
    scores = create_scorer("expected-attention").score_layer(inputs)
    for head in range(HEADS):
        attention = torch.zeros(TOKENS)
        for member in range(GROUP):
            queries = inputs.observation_queries[:, head, member]
            plain = rotary.unrotate(queries, torch.arange(5, 14))
            covariance = torch.cov(plain.T, correction=0)
            drawn = torch.distributions.MultivariateNormal(
                plain.mean(0), covariance + 1e-6 * torch.eye(DIM)
            ).sample((200_000,))
            later = rotary.rotate_to_mean(drawn, 14, 512)
            weights = (later @ inputs.keys[head].T * inputs.scale).exp().mean(0)
            sink = 0.0 if sink_logits is None else sink_logits[head, member].exp()
            attention += weights / (weights.sum() + sink) / GROUP
        wanted = attention * inputs.values[head].norm(dim=-1)
        torch.testing.assert_close(scores[head], wanted, rtol=0.03, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("window", {}, "needs the queries"),
        ("expected-attention", {}, "needs values and the last queries"),
        ("surrogate", {"values": None}, "needs values"),
        ("contrast", {"values": None}, "needs values"),
        ("kvzip", {"reconstruction": None}, "needs the attention of a repeated context"),
    ],
)
def test_a_scorer_says_what_it_misses(name, changes, message, settings):
    with pytest.raises(ValueError, match=message):
        create_scorer(name, settings).score_layer(layer_inputs(**changes))


@pytest.mark.parametrize(("keep_ratio", "power"), [(1, 0), (0.5, 0), (0.4, 0.2), (0.1, 0.5)])
def test_contrast_is_what_it_says_token_by_token(keep_ratio, power):
    angles = torch.arange(20.0)[:, None] * torch.tensor([1.0, 0.5, 0.2, 0.1])
    rotary = RotaryTables(angles.cos(), angles.sin())
    inputs = layer_inputs(rotary=rotary, first_position=3, keep_ratio=keep_ratio)
    got = create_scorer("contrast").score_layer(inputs)
    for head in range(HEADS):
        keys = [
            rotary.unrotate(key[None], torch.tensor([3 + t]))[0]
            for t, key in enumerate(inputs.keys[head])
        ]
        anchor = sum(key / key.norm() for key in keys)
        for token, key in enumerate(keys):
            cosine = float(key @ anchor / (key.norm() * anchor.norm()))
            wanted = (1 - cosine) * float(inputs.values[head, token].norm()) ** power
            assert float(got[head, token]) == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_the_less_is_kept_the_more_the_contrast_counts(settings):
    scorer = create_scorer("surrogate", settings)
    by_ratio = {
        ratio: scorer.score_layer(layer_inputs(keep_ratio=ratio)).log()
        for ratio in (1.0, 0.1, 0.075, 0.05, 0.02)
    }
    torch.testing.assert_close(by_ratio[1.0], by_ratio[0.1])
    contrast = create_scorer("contrast").score_layer(layer_inputs(keep_ratio=0.1)).log()
    for ratio, power in ((0.075, 1.0), (0.05, 2.0), (0.02, 2.0)):
        torch.testing.assert_close(by_ratio[ratio], by_ratio[1.0] + power * contrast)


def test_a_rank_scores_its_own_heads_only(settings):
    everything = create_scorer("surrogate", settings).score_layer(layer_inputs())
    for head in range(HEADS):
        own = create_scorer("surrogate", replace(settings, first_kv_head=head))
        part = layer_inputs()
        part = replace(part, keys=part.keys[head : head + 1], values=part.values[head : head + 1])
        torch.testing.assert_close(own.score_layer(part), everything[head : head + 1])


def test_the_surrogate_needs_its_file():
    with pytest.raises(ValueError, match="needs the file"):
        create_scorer("surrogate")


def test_unknown_scorer_names_the_nearest():
    with pytest.raises(ValueError, match=r"no scorer keydif; did you mean keydiff\?"):
        create_scorer("keydif")
    with pytest.raises(ValueError, match=r"known are .*knorm"):
        create_scorer("zzz")


def test_a_third_party_can_register(monkeypatch):
    monkeypatch.setattr(SCORERS, "_registered", dict(SCORERS._registered))

    @register_scorer
    class Last(Scorer):
        name = "last"

        def score_layer(self, inputs):
            return torch.arange(inputs.keys.shape[1]).float().expand(inputs.keys.shape[:2])

    assert "last" in available_scorers()
    made = create_scorer("last", ScorerSettings(observation_window_tokens=7))
    assert made.settings.observation_window_tokens == 7
    with pytest.raises(ValueError, match="registered already"):
        register_scorer(type("Other", (Last,), {}))


@pytest.mark.parametrize("apart", [12, 3])
def test_of_what_is_written_twice_the_last_copy_stays(apart):
    """One passage of four tokens, twice, among others; both copies get as much attention."""
    torch.manual_seed(3)
    num_tokens, passage = 24, torch.randn(HEADS, 4, DIM)
    plain = torch.randn(HEADS, num_tokens, DIM)
    first, last = slice(2, 6), slice(2 + 4 + apart, 2 + 8 + apart)
    plain[:, first] = passage
    plain[:, last] = passage + 0.01 * torch.randn_like(passage)
    angles = torch.arange(40)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    rotary = RotaryTables(angles.cos(), angles.sin())
    keys = rotary._turn(plain, rotary.cos[:num_tokens], rotary.sin[:num_tokens])
    inputs = layer_inputs(
        num_queries=3, keys=keys, values=torch.ones_like(keys), rotary=rotary,
        num_context_tokens=num_tokens,
    )  # fmt: skip
    # Queries that look at all keys alike, so that nothing but redundancy tells them apart.
    inputs = replace(inputs, observation_queries=torch.zeros_like(inputs.observation_queries))
    scores = create_scorer("redundancy").score_layer(inputs)
    others = [t for t in range(num_tokens) if not (first.start <= t < first.stop)]
    for head in range(HEADS):
        assert scores[head, first].max() < 0.05 * scores[head, others].min()


def test_novelty_is_what_it_says_pair_by_pair():
    keys = layer_inputs().keys
    found = novelty(keys)
    for head in range(HEADS):
        unit = [key / key.norm() for key in keys[head]]
        for token in range(TOKENS):
            later = [torch.dot(unit[token], other).item() for other in unit[token + 1 :]]
            assert found[head, token].item() == pytest.approx(1 - max([0, *later]), abs=1e-5)
    padded = torch.cat([keys[:, :5], torch.zeros(HEADS, 3, DIM), keys[:, 5:]], dim=1)
    found_padded = novelty(padded)
    assert torch.allclose(found_padded[:, [*range(5), *range(8, 15)]], found, atol=1e-6)


def test_r_kv_is_the_papers_rule_written_out():
    torch.manual_seed(7)
    inputs = layer_inputs(num_queries=10, num_context_tokens=TOKENS)
    keys = inputs.keys.clone()
    keys[:, 7] = keys[:, 2] * 1.5  # alike
    inputs = replace(inputs, keys=keys)
    scores = create_scorer("r-kv").score_layer(inputs)
    window = 8
    for head in range(HEADS):
        unit = [key / key.norm() for key in keys[head]]
        weights = [0.0] * TOKENS
        for query in inputs.observation_queries[-window:, head]:
            logits = [max((q @ k).item() * DIM**-0.5 for q in query) for k in keys[head]]
            logits = [math.exp(x) for x in logits[: TOKENS - window]]
            for token, logit in enumerate(logits):
                weights[token] += logit / sum(logits) / window
        pooled = [max(weights[max(0, t - 3) : t + 4]) for t in range(TOKENS)]
        mean = [0.0] * TOKENS
        for row in range(TOKENS):
            likeness = [(unit[row] @ other).item() for other in unit]
            likeness[row] = 0.0
            if similar := [t for t in range(TOKENS) if likeness[t] > 0.5]:
                likeness[similar[-1]] = 0.0
            for token in range(TOKENS):
                mean[token] += likeness[token] / TOKENS
        redundancy = torch.tensor(mean).softmax(dim=0).tolist()
        wanted = [0.1 * a - 0.9 * b for a, b in zip(pooled, redundancy, strict=True)]
        assert scores[head].tolist() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    "name",
    [name for name in available_scorers() if scorer_class(name).rescores_kept],
)
def test_what_is_scored_anew_has_the_scores_that_it_has_among_its_like(name, settings):
    """Pads between kept pairs and new ones change nothing, and positions are those of the pairs."""
    angles = torch.arange(40)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
    rotary = RotaryTables(angles.cos(), angles.sin())
    inputs = layer_inputs(5, num_context_tokens=TOKENS, rotary=rotary, keep_ratio=0.05)
    scorer = create_scorer(name, settings)
    wanted = scorer.score_layer(inputs)
    at = [*range(5), *range(12, 19)]  # seven pads: as many as the widest pooling reaches over
    pads = torch.zeros(HEADS, 7, DIM)
    positions = torch.tensor([*range(5), *[1] * 7, *range(5, TOKENS)]).expand(HEADS, -1)
    real = torch.zeros(HEADS, TOKENS + 7, dtype=torch.bool)
    real[:, at] = True
    padded = replace(
        inputs,
        keys=torch.cat([inputs.keys[:, :5], pads, inputs.keys[:, 5:]], dim=1),
        values=torch.cat([inputs.values[:, :5], pads, inputs.values[:, 5:]], dim=1),
        positions=positions, real=real, first_position=99,
    )  # fmt: skip
    found = scorer.score_layer(padded)
    assert found.isfinite().all()
    reach = {"surrogate": 0, "expected-attention": 0}.get(name, 3)  # of pooling
    far = [i for i in range(TOKENS) if not 5 - reach <= i < 5 + reach]
    assert torch.allclose(found[:, at][:, far], wanted[:, far], atol=1e-6)
