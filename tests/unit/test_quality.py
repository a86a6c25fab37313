"""A promised loss to a number of blocks: the curve, the worth of what is dropped, the choice."""

import pytest
import torch

from vllm_kvzip.budgeting.budgets import allocate_adaptive
from vllm_kvzip.budgeting.quality import LossCurve, QualityTarget, worth_of_dropped
from vllm_kvzip.budgeting.selection import rank, take
from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.request_options import RequestOptions

LAYERS, HEADS, PAGE, BLOCKS = 3, 2, 8, 12
GEOMETRY = CacheGeometry(LAYERS, HEADS, 1, 4, PAGE)
CURVE = LossCurve(0.5, ((0.1, 0.01), (1.0, 0.1), (4.0, 0.8)))


def scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(LAYERS, HEADS, BLOCKS * PAGE, generator=generator)
    return drawn ** torch.tensor([1.0, 3, 9])[:, None, None]  # layers differ


def rule(**more):
    given = {"keep_ratio": 0.75, "min_prompt_tokens": 0, "sink_tokens": 2, "recent_tokens": 4}
    return PrefixRule(**{**given, "block_size": PAGE, "quality_loss": 0.1, **more})


def test_a_curve_meets_its_points_and_goes_on_beyond_them():
    assert [CURVE.nats(worth) for worth, _ in CURVE.points] == pytest.approx([0.01, 0.1, 0.8])
    assert CURVE.nats(0.1**0.5) == pytest.approx(0.1 * 0.1**0.5)  # between two, by logarithms
    assert (CURVE.nats(0), CURVE.nats(0.05), CURVE.nats(8)) == pytest.approx((0, 0.005, 1.6))


def test_a_curve_through_measurements_rises_and_has_their_mean_losses():
    generator = torch.Generator().manual_seed(3)
    worths = torch.rand(400, generator=generator).double() * 4 + 0.01
    noise = torch.rand(400, generator=generator).double() * 1.8 + 0.1  # of mean 1
    found = list(zip(worths.tolist(), (0.1 * worths**2 * noise).tolist(), strict=True))
    curve = LossCurve.through(0.5, found)
    for (worth, nats), (next_worth, next_nats) in zip(curve.points, curve.points[1:], strict=False):
        assert worth < next_worth
        assert nats < next_nats
    assert curve.nats(2.0) == pytest.approx(0.4, rel=0.2)
    mean = sum(map(curve.nats, worths.tolist())) / 400
    assert mean == pytest.approx(sum(nats for _, nats in found) / 400, rel=0.1)


def test_losses_that_do_not_rise_make_no_curve():
    with pytest.raises(ValueError, match="do not rise"):
        LossCurve.through(0.5, [(worth, 1 / worth) for worth in range(1, 40)])


@pytest.mark.parametrize("min_pages", [0, 1, 2])
@pytest.mark.parametrize("power", [0.5, 2.0])
def test_the_worth_is_that_of_what_the_adaptive_budget_drops(power, min_pages):
    ranking = rank(scores(), 2, 4)
    worths = worth_of_dropped(ranking.scores, PAGE, min_pages, power)
    assert len(worths) == LAYERS * HEADS * BLOCKS + 1
    for total in range(LAYERS * HEADS * max(1, min_pages), len(worths), 5):
        pages = allocate_adaptive(ranking.scores, total, PAGE, min_pages)
        plan = take(ranking, torch.zeros_like(pages), pages, PAGE, total)
        heads = torch.arange(pages.numel()).repeat_interleave(pages.flatten())
        dropped = torch.ones(pages.numel(), BLOCKS * PAGE, dtype=torch.bool)
        dropped[heads[:, None].expand_as(plan.positions), plan.positions] = False
        protected = torch.zeros_like(dropped)  # those count as the best of their head
        expected = (scores().flatten(0, 1).double() ** power)[dropped & ~protected].sum()
        assert float(worths[total]) == pytest.approx(float(expected) / (BLOCKS * PAGE), rel=1e-5)


def test_the_fewest_blocks_within_the_promise_are_taken():
    plan = rule().plan(BLOCKS * PAGE)
    ranking = rank(scores(), plan.num_sink_tokens, plan.num_recent_tokens)
    worths = worth_of_dropped(ranking.scores, PAGE, plan.min_pages_per_head, CURVE.power)
    fitted = QualityTarget(CURVE, GEOMETRY).fit(ranking, plan)
    count = fitted.num_compressed_blocks
    assert 1 < count < plan.num_compressed_blocks
    assert fitted.estimated_loss == CURVE.nats(float(worths[count * LAYERS * HEADS])) <= 0.1
    assert CURVE.nats(float(worths[(count - 1) * LAYERS * HEADS])) > 0.1
    assert fitted.as_told()["estimated_loss"] == fitted.estimated_loss
    assert fitted.terms == plan.terms


def test_a_smaller_promise_keeps_more_and_ranks_take_the_others_for_alike():
    ranking = rank(scores(), 2, 4)

    def blocks(loss, num_ranks=1):
        plan = rule(quality_loss=loss).plan(BLOCKS * PAGE)
        return QualityTarget(CURVE, GEOMETRY, num_ranks).fit(ranking, plan).num_compressed_blocks

    counts = [blocks(loss) for loss in (10.0, 0.3, 0.1, 0.03, 1e-9)]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 9)
    assert blocks(0.1, num_ranks=2) > blocks(0.1)


def test_what_cannot_be_promised_is_told():
    plan = rule(keep_ratio=0.25).plan(BLOCKS * PAGE)
    fitted = QualityTarget(CURVE, GEOMETRY).fit(rank(scores(), 2, 4), plan)
    assert fitted.num_compressed_blocks == plan.num_compressed_blocks == 3
    assert fitted.estimated_loss > 0.1


def test_a_request_names_its_own_promise_or_none():
    tokens = BLOCKS * PAGE
    assert rule().plan(tokens).quality_loss == 0.1
    assert rule().plan(tokens, RequestOptions(quality_loss=0.5)).quality_loss == 0.5
    assert rule().plan(tokens, RequestOptions(quality_loss=0.0)).quality_loss is None
    alone = rule(quality_loss=None)
    assert alone.plan(tokens, RequestOptions(quality_loss=0.5)).quality_loss is None
    assert alone.skip_reason(tokens, RequestOptions(keep_ratio=1.0)) == "nothing_to_free"
    assert rule().plan(tokens, RequestOptions(keep_ratio=1.0)).num_compressed_blocks == BLOCKS
