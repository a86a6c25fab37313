"""Rounds of two tiers: what is kept stays what it was, is quantized once, and never comes back."""

from typing import get_args

import pytest
import torch

from vllm_kvzip.budgeting.kept_positions import KeptPositions
from vllm_kvzip.config import Budget
from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.quantization import choose_quantization
from vllm_kvzip.scoring import create_scorer
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.storage.page_store import PackedPages, PageCodec
from vllm_kvzip.storage.row_pages import RowPages
from vllm_kvzip.storage.tiered_attention import quantized_tokens

LAYERS, HEADS, N, D, BLOCKS = 2, 2, 16, 32, 90
GEOMETRY = CacheGeometry(LAYERS, HEADS, group_size=2, head_dim=D, block_size=N)
POOL = PagePool(num_blocks=BLOCKS, num_layers=LAYERS, num_kv_heads=HEADS)
SINKS, RECENT = 5, 6
SHARES = [[1.0, 0.1], [0.3, 0.6]]


class Answer:
    """A request that is compressed in rounds, and what each head must hold.

    Scores are the negative norms of keys, so that a score says which token it is of.

    Args:
        make_store: pages and quantization to a page store.
        budget: how pages are shared between heads.
        formats: of keys and values.
        rule: see ``PrefixRule``.
    """

    def __init__(self, make_store, budget, rule, formats=("nf4", "int8")):
        torch.manual_seed(5)
        self.rule, self.free = rule, list(range(1, BLOCKS))
        self.quantization = make_quantization(formats)
        self.pages = torch.full((BLOCKS * LAYERS * HEADS, 2 * N * D), float("nan"))
        self.store = make_store(self.pages, self.quantization)
        self.press = Compressor(
            geometry=GEOMETRY, pool=POOL, store=self.store, rule=rule,
            scorer=create_scorer("knorm"), budget=budget, head_fractions=lambda _: SHARES,
            head_importance=SHARES, tier_fractions=lambda _: (SHARES, SHARES),
        )  # fmt: skip
        self.keys, self.values = torch.randn(2, LAYERS, HEADS, 1600, D)
        self.keys[..., 3] *= 6.0  # an outlier channel, and a constant
        self.keys[..., 5] += 4.0
        self.blocks, self.prefix, self.done = [], None, None
        self.record = KeptPositions()
        # Keys and values of quantized tokens, as they were read first.
        self.was_quantized = torch.full((2, *self.keys.shape), float("nan"))

    def compress(self, plan):
        """Write what is new, and compress; every other page stays what it is."""
        new = [self.free.pop(0) for _ in range(plan.num_prefix_blocks - plan.start_blocks)]
        span = slice(plan.start_blocks * N, plan.boundary_tokens)
        ids = POOL.page_ids(torch.tensor(new))
        for layer in range(LAYERS):
            own = self.keys[layer, :, span], self.values[layer, :, span]
            if hasattr(self.store, "write"):
                self.store.write(ids[layer].flatten(), *(half.reshape(-1, D) for half in own))
            else:
                for view, half in zip(self.store.views(), own, strict=True):
                    view[ids[layer].flatten()] = half.reshape(-1, N, D)
        target = [self.free.pop(0) for _ in range(plan.num_compressed_blocks)]
        before = self.pages.clone()
        self.prefix, _ = self.press.compress(
            source_blocks=new, target_blocks=target, plan=plan,
            observation_queries=None, scale=1.0, seed=0, earlier=self.prefix, record=self.record,
        )  # fmt: skip
        written = torch.zeros(len(self.pages), dtype=torch.bool)
        written[POOL.page_ids(torch.tensor(target)).flatten()] = True
        assert torch.equal(self.pages[~written].nan_to_num(7), before[~written].nan_to_num(7))
        self.free += [*self.blocks, *new]
        self.blocks, self.done = target, plan
        return span

    def tokens_of(self, layer, head, scores):
        """Which tokens some scores are of; the sinks come first and have none."""
        known = -self.keys[layer, head].norm(dim=-1)
        is_sink = scores == float("inf")
        distance = (known - torch.where(is_sink, 0.0, scores)[:, None]).abs()
        tokens = distance.argmin(dim=1)
        assert (distance.amin(dim=1)[~is_sink] < 1e-4).all()
        return torch.where(is_sink, is_sink.cumsum(0) - 1, tokens)

    def held(self):
        """For each head: tokens in either tier; what lies there is compared on the way."""
        prefix, size = self.prefix, self.done.quantized_page_tokens
        if prefix.quantized is not None:
            counts = quantized_tokens(prefix, self.done.boundary_tokens, N, size)
            stored = self.quantization.pages_of(self.pages)[prefix.quantized.page_ids]
            halves = [
                self.quantization.turn_back(half) for half in self.quantization.decode(stored)
            ]
            starts = prefix.quantized.starts
        found = {}
        for pair in range(LAYERS * HEADS):
            layer, head = divmod(pair, HEADS)
            keys, values = self.keys[layer, head], self.values[layer, head]
            part = slice(*prefix.offsets[pair : pair + 2].tolist())
            full = self.tokens_of(layer, head, prefix.scores.view(-1, N)[part].flatten())
            if len(full):
                ids = prefix.page_ids[part][None]
                assert torch.equal(self.store.read_keys(ids, layer)[0], keys[full])
                assert torch.equal(self.store.read_values(ids, layer)[0], values[full])
            rest = full[:0]
            if prefix.quantized is not None:
                part = slice(*starts[pair : pair + 2].tolist())
                scores = prefix.quantized_scores.view(-1, size)[part].flatten()
                count = int(counts[layer, head])
                assert (scores[:count] > float("-inf")).all()
                assert (scores[count:] == float("-inf")).all()
                is_sink = scores[:count] == float("inf")
                first = int((full < SINKS).sum())
                rest = self.tokens_of(layer, head, scores[:count])
                rest = torch.where(is_sink, rest + first, rest)
                self.compare(layer, head, rest, *(h[part].flatten(0, 1)[:count] for h in halves))
            found[layer, head] = full.tolist(), rest.tolist()
        self.compare_record(found)
        return found

    def compare_record(self, found):
        """What was recorded is what lies in the pages."""
        masks = [
            [[head.nonzero().flatten().tolist() for head in layer] for layer in mask]
            for mask in self.record.masks(self.done.boundary_tokens)
        ]
        for (layer, head), held in found.items():
            recorded = [mask[layer][head] for mask in masks] + [[]]
            assert recorded[:2] == [*map(sorted, held)]

    def compare(self, layer, head, tokens, keys, values):
        """Quantized tokens of a head, with what they are and with what they first were."""
        if not len(tokens):
            return
        transform = self.prefix.key_transform.at(layer).at(head)
        keys = transform.undo(keys)
        for found, exact, error in (
            (keys, self.keys[layer, head, tokens], 0.2),
            (values, self.values[layer, head, tokens], 0.02),
        ):
            assert ((found - exact).norm(dim=-1) < error * exact.norm(dim=-1)).all()
        found = torch.stack([keys, values])
        was = self.was_quantized[:, layer, head, tokens]
        was = torch.where(was.isnan(), found, was)
        torch.testing.assert_close(found, was, rtol=0, atol=1e-4)  # it was rotated back
        self.was_quantized[:, layer, head, tokens] = was


def make_quantization(formats=("nf4", "int8")):
    return choose_quantization(
        page_bytes=2 * N * D * 4, head_dim=D, keys=formats[0], values=formats[1], rotation="auto"
    )


def rows_of(pages, chosen):
    return RowPages(pages, N, D, chosen)


def packed_of(pages, chosen):
    codec = PageCodec(torch.randperm(N * D), torch.randperm(N * D))
    return PackedPages(pages, codec, N, D, chosen)


def rule_of(mode, by_bytes=False, **budgets):
    chosen = make_quantization()
    tiers = TierRule(
        mode, N, chosen.layout.page_tokens, split=chosen.split, full_share=0.3, by_bytes=by_bytes
    )
    ratio = {"keep_ratio": 0.5, "min_prompt_tokens": 40, **budgets}
    return PrefixRule(sink_tokens=SINKS, recent_tokens=RECENT, block_size=N, tiers=tiers, **ratio)


CASES = [
    ("mixed", 20, {"decode_blocks": 6}),
    ("mixed", 200, {"decode_blocks": 6}),
    ("mixed", 600, {"prefill_blocks": 6}),
    # A prompt of which nothing is quantized.
    ("mixed", 200, {"decode_blocks": 6, "keep_ratio": 1.0, "by_bytes": True}),
    ("quantize", 100, {"decode_blocks": 4}),
    ("quantize", 600, {"prefill_blocks": 5, "decode_blocks": 3}),
]
STORES = [
    *((packed_of, budget, case, 11) for case in CASES for budget in ("adaptive", "profile")),
    *((packed_of, budget, CASES[1], 11) for budget in get_args(Budget)),
    (rows_of, "adaptive", ("mixed", 50, {"decode_blocks": 3}), 5),  # Triton's interpreter is slow
]


@pytest.mark.parametrize(("make_store", "budget", "case", "num_rounds"), STORES)
def test_pairs_stay_what_they_are(make_store, budget, case, num_rounds):
    mode, prompt, budgets = case
    answer = Answer(make_store, budget, rule_of(mode, **budgets))
    held, dropped = {}, 0
    while num_rounds:
        plan = answer.rule.next_plan(prompt, done=answer.done)
        span = answer.compress(plan)
        earlier, held = held, answer.held()
        num_rounds -= plan.is_round
        assert (
            plan.num_compressed_blocks
            <= max(count for name, count in budgets.items() if "blocks" in name)
            or not plan.is_round
        )
        for pair, (full, quantized) in held.items():
            kept = {*full, *quantized}
            assert len(kept) == len(full) + len(quantized)
            assert kept >= {*range(SINKS), *range(span.stop - RECENT, span.stop)}
            before = earlier.get(pair, ([], []))
            assert kept <= {*before[0], *before[1], *range(span.start, span.stop)}
            assert not {*full} & {*before[1]}  # no quantized pair becomes a full one
            assert {*before[1]} & kept <= {*quantized}
            dropped += len({*before[0], *before[1]} - kept)
            if mode == "quantize":
                assert not full
            elif plan.is_round and 0 not in before[1]:
                assert full[:SINKS] == list(range(SINKS))
    assert dropped > 0 or make_store is rows_of  # few rounds
    assert not answer.was_quantized.isnan().all()
