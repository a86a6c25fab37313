"""Rounds whose scorer sees kept pairs and new ones at once, against a loop over single pairs."""

from dataclasses import replace

import pytest
import torch

from vllm_kvzip.budgeting.candidates import Candidates
from vllm_kvzip.budgeting.kept_positions import KeptPositions
from vllm_kvzip.core import CacheGeometry, CompressedPrefix, StoredTier
from vllm_kvzip.model.rotary import RotaryTables
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.scoring import Scorer, create_scorer
from vllm_kvzip.storage import row_pages
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.storage.page_store import PackedPages, PageCodec

LAYERS, HEADS, DIM, BLOCK, TOKENS = 3, 2, 8, 4, 48
GEOMETRY = CacheGeometry(LAYERS, HEADS, group_size=2, head_dim=DIM, block_size=BLOCK)
POOL = PagePool(64, LAYERS, HEADS)
ANGLES = torch.arange(64)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.01])
ROTARY = RotaryTables(ANGLES.cos(), ANGLES.sin())
RULE = PrefixRule(
    0.5, 0, sink_tokens=2, recent_tokens=2, block_size=BLOCK, decode_blocks=4, num_guessed_tokens=3
)


class FromTheMean(Scorer):
    """Distance of a key, without its rotation, from the mean of all that compete; and its age."""

    name = "from-the-mean"
    rescores_kept = True
    needs_rotary = True
    needs_values = True
    seen: list

    def score_layer(self, inputs):
        self.seen.append(inputs)
        keys = inputs.unrotated_keys()
        assert keys.isfinite().all() and inputs.values.isfinite().all()
        real = torch.ones(keys.shape[:2]) if inputs.real is None else inputs.real
        mean = keys.sum(dim=1, keepdim=True) / real.sum(dim=1)[:, None, None]
        positions = inputs.positions_of(slice(0, keys.shape[1]))
        return (keys - mean).norm(dim=-1) + 0.01 * positions


def score_of(plain, head, candidates):
    """The same of one head, pair by pair."""
    mean = sum(plain[head][t] for t in candidates) / len(candidates)
    return {t: (plain[head][t] - mean).norm().item() + 0.01 * t for t in candidates}


@pytest.mark.parametrize("recent", [2, 10])  # 10: more than a round's new tokens
@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_all_that_competes_is_scored_at_once(budget, recent):
    """Pads read page 0, which holds NaN here."""
    torch.manual_seed(5)
    pages = torch.full((64 * LAYERS * HEADS, 2 * BLOCK * DIM), float("nan"))
    store = PackedPages(pages, PageCodec.identity(BLOCK, DIM), BLOCK, DIM)
    scorer = FromTheMean(None)
    scorer.seen, record = [], KeptPositions()
    rule = replace(RULE, recent_tokens=recent)
    press = Compressor(
        geometry=GEOMETRY, pool=POOL, store=store, rule=rule, scorer=scorer, budget=budget,
        rotary=[ROTARY] * LAYERS,
    )  # fmt: skip
    plain = torch.randn(LAYERS, HEADS, TOKENS, DIM)
    plain[:, 0] *= 2  # so that budgets differ where they may
    keys = ROTARY._turn(plain, ROTARY.cos[:TOKENS], ROTARY.sin[:TOKENS])
    kept = {(layer, head): [] for layer in range(LAYERS) for head in range(HEADS)}
    free, prefix, done, rounds = list(range(1, 64)), None, None, 0
    while (plan := rule.next_plan(9, done=done)).boundary_tokens <= TOKENS:
        dense = [free.pop(0) for _ in range(plan.num_prefix_blocks - plan.start_blocks)]
        span = slice(plan.start_blocks * BLOCK, plan.boundary_tokens)
        for layer in range(LAYERS):
            ids = POOL.page_ids(torch.tensor(dense))[layer].flatten()
            new = keys[layer, :, span].reshape(-1, DIM)
            store.write(ids, new, new + 1)
        prefix, _ = press.compress(
            source_blocks=dense,
            target_blocks=[free.pop(0) for _ in range(plan.num_compressed_blocks)],
            plan=plan, observation_queries=None, scale=1.0, seed=0, earlier=prefix, record=record,
        )  # fmt: skip
        (recorded,) = record.masks(plan.boundary_tokens)
        rounds += plan.is_round
        assert prefix.scores is None
        assert int(prefix.pages.sum()) == plan.num_compressed_blocks * LAYERS * HEADS
        start = 0
        for (layer, head), positions in kept.items():
            candidates = positions + list(range(span.start, span.stop))
            scores = score_of(plain[layer], head, candidates)
            protected = {0, 1, *candidates[-recent:]}
            count = int(prefix.pages[layer, head]) * BLOCK
            ranked = sorted(candidates, key=lambda t: (t not in protected, -scores[t]))
            positions[:] = sorted(ranked[:count])
            own = slice(start * BLOCK, start * BLOCK + count)
            assert prefix.positions[own].tolist() == positions
            assert recorded[layer, head].nonzero().flatten().tolist() == positions
            ids = prefix.page_ids[start : start + count // BLOCK]
            assert torch.equal(store.read_keys(ids[None], layer)[0], keys[layer, head, positions])
            start += count // BLOCK
        done = plan
    assert rounds >= 3
    last = scorer.seen[-1]
    assert last.num_context_tokens == done.boundary_tokens < done.ready_tokens
    has_pads = not all(inputs.real.all() for inputs in scorer.seen[-LAYERS:])
    assert has_pads == (budget == "adaptive")


def test_candidates_of_a_first_round_are_the_new_pairs():
    sources = torch.arange(LAYERS * HEADS * 3).view(LAYERS, HEADS, 3)
    found = Candidates.of_round(None, sources, 8, BLOCK)
    assert found.real is None and found.available is None
    assert torch.equal(found.pages, sources)
    assert found.positions.shape == (LAYERS, HEADS, 12)
    assert found.positions[2, 1].tolist() == list(range(8, 20))


def test_pads_stand_between_kept_pairs_and_new_ones():
    pages = torch.tensor([[2, 1], [1, 3]])
    earlier = CompressedPrefix(
        (StoredTier(torch.arange(10, 17), pages),),
        positions=torch.arange(14, dtype=torch.int32),
    )
    sources = torch.full((2, 2, 1), 99)
    found = Candidates.of_round(earlier, sources, 50, 2)
    assert found.pages.tolist() == [
        [[10, 11, 0, 99], [12, 0, 0, 99]],
        [[13, 0, 0, 99], [14, 15, 16, 99]],
    ]
    assert found.available.tolist() == [[3, 2], [2, 4]]
    assert found.real.sum(dim=2).tolist() == [[6, 4], [4, 8]]
    own = [found.positions[at][found.real[at]].tolist() for at in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert own == [
        [0, 1, 2, 3, 50, 51], [4, 5, 50, 51], [6, 7, 50, 51], [8, 9, 10, 11, 12, 13, 50, 51],
    ]  # fmt: skip


def test_scorers_that_compare_parts_still_carry_their_scores(monkeypatch):
    """A scorer that scores anew carries positions, where pages are not quantized."""
    rule = replace(RULE, decode_blocks=None)
    for scorer, with_rounds, carries in (
        ("knorm", RULE, (True, False)), ("window", RULE, (False, True)),
        ("window", rule, (False, False)), ("knorm", rule, (False, False)),
    ):  # fmt: skip
        pages = torch.randn(64 * LAYERS * HEADS, 2 * BLOCK * DIM)
        store = PackedPages(pages, PageCodec.identity(BLOCK, DIM), BLOCK, DIM)
        press = Compressor(
            geometry=GEOMETRY, pool=POOL, store=store, rule=with_rounds,
            scorer=create_scorer(scorer), budget="adaptive",
        )  # fmt: skip
        prefix, _ = press.compress(
            source_blocks=range(8), target_blocks=range(8, 12), plan=rule.plan(32), scale=1.0,
            seed=0, observation_queries=[torch.randn(3, HEADS, 2, DIM)] * LAYERS,
        )  # fmt: skip
        assert (prefix.scores is not None, prefix.positions is not None) == carries


@pytest.mark.parametrize("name", ["window", "expected-attention", "r-kv"])
def test_a_round_waits_for_a_device_only_to_count(monkeypatch, name):
    """As ``tests/unit/test_on_device.py``; the width of what was kept is counted beforehand."""
    monkeypatch.setattr(row_pages, "compact_pages", lambda *tensors: None)
    meta = torch.device("meta")
    angles = torch.zeros(64, DIM // 2, device=meta)
    press = Compressor(
        geometry=GEOMETRY, pool=POOL, rule=RULE, scorer=create_scorer(name), budget="uniform",
        store=row_pages.RowPages(torch.zeros(384, 8 * DIM, device=meta), 4, DIM),
        rotary=[RotaryTables(angles, angles)] * LAYERS,
    )  # fmt: skip
    count = 4 * LAYERS * HEADS
    pages = torch.zeros(LAYERS, HEADS, dtype=torch.int64, device=meta)
    tier = StoredTier(torch.zeros(count, dtype=torch.int64, device=meta), pages)
    positions = torch.zeros(count * BLOCK, dtype=torch.int32, device=meta)
    earlier = CompressedPrefix((tier,), positions=positions)
    earlier.__dict__["padded"] = torch.zeros(LAYERS, HEADS, 5, dtype=torch.int32, device=meta)
    first = RULE.next_plan(9)
    plan = RULE.next_plan(9, done=first)
    num_new = plan.num_prefix_blocks - plan.start_blocks
    prefix, _ = press.compress(
        source_blocks=range(num_new), target_blocks=range(20, 20 + plan.num_compressed_blocks),
        plan=plan, scale=1.0, seed=0, earlier=earlier,
        observation_queries=[torch.zeros(6, HEADS, 2, DIM, device=meta)] * LAYERS,
    )  # fmt: skip
    assert prefix.positions.device == meta
    assert prefix.positions.dtype == torch.int32
