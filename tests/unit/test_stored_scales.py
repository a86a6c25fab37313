"""Pages of 8-bit numbers: compacted as they are stored, read and quantized as numbers."""

import pytest
import torch

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.planning.tiers import TierRule
from vllm_kvzip.quantization import choose_quantization, unpack_pages
from vllm_kvzip.scoring import create_scorer
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.storage.row_pages import RowPages
from vllm_kvzip.storage.stored_scales import KEYS, VALUES, StoredScales

N, D, BLOCKS = 16, 64, 30
GEOMETRY = CacheGeometry(num_layers=2, num_kv_heads=2, group_size=2, head_dim=D, block_size=N)
POOL = PagePool(num_blocks=BLOCKS, num_layers=2, num_kv_heads=2)
SOURCE, TARGET = [9, 4, 17, 12, 2, 8, 22, 13], [29, 0, 11, 1]
E4M3 = torch.float8_e4m3fn


@pytest.fixture
def scales():
    factors = 0.05 + torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    return StoredScales(E4M3, torch.float32, E4M3, factors)


def nf4():
    page_bytes = 2 * N * D
    return choose_quantization(
        page_bytes=page_bytes, head_dim=D, keys="nf4", values="nf4", rotation="auto"
    )


def filled_pool():
    """A pool, as bytes, and its prompt's numbers as they are stored, ``[2, L, H, T, D]``."""
    torch.manual_seed(1)
    stored = (30 * torch.randn(2, 2, 2, len(SOURCE) * N, D)).to(E4M3)
    pool = torch.full((BLOCKS * 4, N, 2, D), 0x7F, dtype=torch.uint8)  # NaN
    ids = POOL.page_ids(torch.tensor(SOURCE))
    for half in range(2):
        pool[ids.flatten(), :, half] = stored[half].view(torch.uint8).view(-1, N, D)
    return pool.view(len(pool), -1), stored


def compress(scales, rule, chosen=None):
    pages, stored = filled_pool()
    store = RowPages(pages, N, D, chosen, scales)
    press = Compressor(
        geometry=GEOMETRY, pool=POOL, store=store, rule=rule, scorer=create_scorer("knorm"),
        budget="adaptive",
    )  # fmt: skip
    plan = rule.plan(len(SOURCE) * N + 3)
    prefix, _ = press.compress(
        source_blocks=SOURCE, target_blocks=TARGET[: plan.num_compressed_blocks], plan=plan,
        observation_queries=None, scale=1.0, seed=0,
    )  # fmt: skip
    return plan, prefix, pages, store, stored


def ranked_keys(scales, stored, pair):
    """Tokens of a head from the best to the worst for ``knorm``, by what the bytes stand for."""
    layer, head = divmod(pair, 2)
    numbers = stored[0, layer, head].float() * scales.factors[KEYS, layer, head]
    norms = numbers.norm(dim=-1)
    norms[:2] = norms[-2:] = -1.0
    return norms.argsort(stable=True)


def test_what_is_kept_are_the_same_bytes(scales):
    rule = PrefixRule(0.5, 0, sink_tokens=2, recent_tokens=2, block_size=N)
    _, prefix, pages, store, stored = compress(scales, rule)
    assert int(prefix.pages.sum()) == 16
    assert prefix.pages.unique().numel() > 1  # heads differ by their scales
    start = 0
    for pair, count in enumerate(prefix.pages.flatten().tolist()):
        layer, head = divmod(pair, 2)
        ids = prefix.page_ids[start : start + count]
        start += count
        best = ranked_keys(scales, stored, pair)[: count * N].sort().values
        found = pages[ids].view(count * N, 2, D)
        for half, (which, read) in enumerate(
            ((KEYS, store.read_keys), (VALUES, store.read_values))
        ):
            kept = stored[half, layer, head, best]
            assert torch.equal(found[:, half], kept.view(torch.uint8))
            numbers = kept.float() * scales.factors[which, layer, head]
            if count:
                assert torch.equal(read(ids.expand(2, -1), layer)[head], numbers)


def test_a_kernel_reads_what_is_stored(scales):
    pages, stored = filled_pool()
    keys, values = RowPages(pages, N, D, scales=scales).views()
    first = POOL.page_id(1, SOURCE[0], 1)
    assert keys.dtype is values.dtype is E4M3
    assert torch.equal(keys[first].float(), stored[0, 1, 1, :N].float())
    assert torch.equal(values[first].float(), stored[1, 1, 1, :N].float())


def test_quantized_pages_hold_numbers_that_are_multiplied_already(scales):
    chosen = nf4()
    tiers = TierRule("quantize", N, chosen.layout.page_tokens, split=chosen.split)
    rule = PrefixRule(0.5, 0, sink_tokens=2, recent_tokens=2, block_size=N, tiers=tiers)
    plan, prefix, pages, _, stored = compress(scales, rule, chosen)
    page_tokens = chosen.layout.page_tokens
    assert N < chosen.head_page_tokens < 2 * N  # half of what a page of 16-bit numbers would hold
    start = 0
    for pair, count in enumerate(prefix.quantized.pages.flatten().tolist()):
        layer, head = divmod(pair, 2)
        ids = prefix.quantized.page_ids[start : start + count]
        start += count
        num_tokens = min(count * page_tokens, plan.boundary_tokens)
        best = ranked_keys(scales, stored, pair)[:num_tokens].sort().values
        found = unpack_pages(chosen.pages_of(pages)[ids], chosen.layout)
        for half, which in enumerate((KEYS, VALUES)):
            numbers = stored[half, layer, head, best].float() * scales.factors[which, layer, head]
            back = chosen.turn_back(found[half][:num_tokens])
            if which == KEYS:
                back = prefix.key_transform.at(layer).at(head).undo(back)
            assert (back - numbers).norm() < 0.12 * numbers.norm()
