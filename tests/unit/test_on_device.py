"""Compression on a device that is not the CPU: nothing lies on the wrong one, nothing is awaited.

Tensors on torch's device ``meta`` have a shape and no content. An operation that mixes devices
fails there, and so does one that has to look at a value, for which a GPU would be waited for.
"""

from dataclasses import replace

import pytest
import torch

from vllm_kvzip.budgeting.allocation import PageAllocator
from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.head_profiles.networks import LayerSurrogate
from vllm_kvzip.model.rotary import RotaryTables
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.quantization import choose_quantization
from vllm_kvzip.scoring import create_scorer
from vllm_kvzip.scoring.base import Scorer, ScorerSettings
from vllm_kvzip.scoring.surrogate import SurrogateScorer
from vllm_kvzip.storage import row_pages
from vllm_kvzip.storage.head_pages import PagePool

GEOMETRY = CacheGeometry(num_layers=3, num_kv_heads=2, group_size=2, head_dim=8, block_size=4)
POOL = PagePool(num_blocks=64, num_layers=3, num_kv_heads=2)
DEVICE = torch.device("meta")
SCORERS = (
    "contrast",
    "keydiff",
    "knorm",
    "kvzip",
    "window",
    "redundancy",
    "r-kv",
    "expected-attention",
    "streaming",
    "profile",
)


@pytest.fixture
def launched(monkeypatch):
    """What compaction hands to its kernel, which cannot run there."""
    calls = []
    monkeypatch.setattr(row_pages, "compact_pages", lambda *tensors: calls.append(tensors))
    return calls


def compress(scorer, budget, mode="evict"):
    fractions = [[1.0, 0.1], [0.2, 0.3], [0.9, 0.5]] if budget == "profile" else None
    rule = PrefixRule(0.5, 0, sink_tokens=2, recent_tokens=2, block_size=4)
    head_dim, quantization = 8, None
    if mode != "evict":
        head_dim = 32
        quantization = choose_quantization(
            page_bytes=1024, head_dim=32, keys="nf4", values="int8", rotation="auto"
        )
        tiers = TierRule(
            mode, 4, quantization.layout.page_tokens, full_share=0.5, split=quantization.split
        )
        rule = replace(rule, tiers=tiers)
    angles = torch.zeros(64, 4, device=DEVICE)
    geometry = replace(GEOMETRY, head_dim=head_dim)
    pages = torch.zeros(384, 8 * head_dim, device=DEVICE)
    press = Compressor(
        geometry=geometry, pool=POOL, scorer=scorer, budget=budget, rule=rule,
        store=row_pages.RowPages(pages, 4, head_dim, quantization),
        head_fractions=lambda _: fractions, head_importance=fractions,
        rotary=[RotaryTables(angles, angles)] * 3,
    )  # fmt: skip
    plan = rule.plan(34)
    prefix, _ = press.compress(
        source_blocks=[9, 4, 17, 30, 2, 8, 41, 22],
        target_blocks=[50, 12, 33, 60][: plan.num_compressed_blocks],
        plan=plan,
        observation_queries=[torch.zeros(6, 2, 2, head_dim, device=DEVICE)] * 3,
        reconstruction=torch.zeros(3, 2, 32, device=DEVICE),
        scale=1.0,
        seed=0,
    )
    return plan, prefix, prefix.offsets


@pytest.mark.parametrize("budget", ["adaptive", "adaptive-per-layer"])
def test_budgets_by_score_are_made_where_the_scores_are(launched, monkeypatch, budget):
    """An index of another device is no error on this one, so the result is looked at."""
    made, allocate = [], PageAllocator.full

    def watched(*args):
        made.append(allocate(*args))
        return made[-1]

    monkeypatch.setattr(PageAllocator, "full", watched)
    compress(create_scorer("keydiff"), budget)
    assert [pages.device for pages in made] == [DEVICE]


@pytest.mark.parametrize("budget", ["adaptive", "adaptive-per-layer", "uniform", "profile"])
@pytest.mark.parametrize("name", SCORERS)
def test_no_scorer_and_no_budget_waits_or_mixes_devices(launched, name, budget):
    plan, prefix, offsets = compress(create_scorer(name), budget)
    total = plan.num_compressed_blocks * 6
    assert prefix.page_ids.shape == (total,)
    assert {t.device.type for t in (prefix.page_ids, prefix.pages, offsets)} == {"meta"}
    ((keys, values, sources, positions, heads, targets),) = launched
    assert keys.shape == values.shape == (384, 4, 8)
    assert sources.shape == (6, 8)
    assert positions.shape == (4 * total,)
    assert heads.shape == targets.shape == (total,)
    indices = (sources, positions, heads, targets)
    assert {(t.device.type, t.dtype) for t in indices} == {("meta", torch.int32)}


@pytest.mark.parametrize("budget", ["adaptive", "adaptive-per-layer", "uniform", "profile"])
@pytest.mark.parametrize("mode", ["quantize", "mixed"])
def test_quantizing_does_not_wait_either(launched, monkeypatch, mode, budget):
    filled = []
    monkeypatch.setattr(row_pages, "quantize_pages", lambda *values: filled.append(values))
    monkeypatch.setattr(row_pages, "PAGES_AT_ONCE", 4)
    plan, prefix, _ = compress(create_scorer("keydiff"), budget, mode)
    total = plan.num_quantized_pages * 6
    assert total
    assert (plan.num_full_blocks > 0) == (mode == "mixed")
    assert prefix.quantized.page_ids.shape == (total,)
    assert prefix.offsets_of(1).device == DEVICE
    assert prefix.key_transform.mean.shape == prefix.key_transform.scale.shape == (3, 2, 32)
    assert prefix.key_transform.scale.device == DEVICE
    assert sum(len(values[4]) for values in filled) == total
    for keys, vals, rows, pages, targets, layout, _ in filled:
        assert keys.shape == vals.shape == (len(targets) * layout.page_tokens, 32)
        assert rows.shape == (len(targets), layout.page_tokens)
        assert pages.shape == (384 * plan.quantized_split, layout.page_bytes)
        assert {t.device for t in (keys, vals, rows, pages, targets)} == {DEVICE}


def test_the_surrogate_follows_the_keys(launched):
    scorer = object.__new__(SurrogateScorer)
    Scorer.__init__(scorer, ScorerSettings())
    network = LayerSurrogate(
        torch.zeros(2, 2 * 8 + 3, 5), torch.zeros(2, 5), torch.zeros(2, 5), torch.zeros(2)
    )
    scorer._layers = [network] * 3
    _, prefix, _ = compress(scorer, "adaptive")
    assert prefix.page_ids.device == DEVICE


def test_a_scorer_that_looks_at_a_value_is_seen(launched):
    class Looking(type(create_scorer("knorm"))):
        def score_layer(self, inputs):
            scores = super().score_layer(inputs)
            return scores / float(scores.abs().max())

    with pytest.raises(Exception, match=r"item|DataDependent|local_scalar"):
        compress(Looking(None), "adaptive")


def test_a_scorer_on_the_wrong_device_is_seen(launched):
    class Elsewhere(type(create_scorer("knorm"))):
        def score_layer(self, inputs):
            return super().score_layer(inputs) + torch.zeros(inputs.keys.shape[:2])

    with pytest.raises(Exception, match="device"):
        compress(Elsewhere(None), "adaptive")
