"""What compression sets aside on a GPU is enough for every scorer, whatever the model's shape."""

import pytest
import torch
from live_bytes import peak_bytes

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.head_profiles.calibration import NETWORK_WIDTH
from vllm_kvzip.head_profiles.head_profile import ModelFingerprint
from vllm_kvzip.head_profiles.networks import LayerSurrogate, save_surrogate
from vllm_kvzip.layer_inputs import LayerInputs
from vllm_kvzip.model.key_transform import KeyTransform
from vllm_kvzip.model.rotary import RotaryTables
from vllm_kvzip.pipeline import Compressor
from vllm_kvzip.planning.prefix_rule import PrefixRule
from vllm_kvzip.scoring import ScorerSettings, available_scorers, create_scorer
from vllm_kvzip.storage.head_pages import PagePool
from vllm_kvzip.storage.page_store import PackedPages, PageCodec
from vllm_kvzip.vllm_bridge.worker.gpu_worker import compression_bytes

TOKENS = 4096
# KV heads of a rank, query group, head size: of Llama 8B, Qwen 7B, both on one of many ranks, and
# shapes with a group that is as large as they come.
SHAPES = ((8, 4, 128), (4, 7, 128), (1, 4, 128), (1, 7, 128), (1, 32, 64), (2, 8, 256), (5, 3, 64))


def settings(folder, num_heads, head_dim):
    model = ModelFingerprint(
        architecture="A", num_layers=1, num_query_heads=num_heads, num_kv_heads=num_heads,
        head_dim=head_dim,
    )  # fmt: skip
    parts = (num_heads, 2 * head_dim + 3, NETWORK_WIDTH), (num_heads, NETWORK_WIDTH)
    network = LayerSurrogate(*map(torch.zeros, (*parts, parts[1], (num_heads,))))
    save_surrogate(folder / "a.safetensors", [network], model, {})
    return ScorerSettings(surrogate=str(folder / "a.safetensors"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", available_scorers())
def test_no_scorer_takes_more_than_is_set_aside(name, shape, tmp_path):
    num_heads, group_size, head_dim = shape
    scorer = create_scorer(name, settings(tmp_path, num_heads, head_dim))
    keys = torch.randn(num_heads, TOKENS, head_dim)
    angles = torch.rand(TOKENS + 600, head_dim // 2)
    for window, keep_ratio in ((32, 0.5), (512, 0.02)):
        inputs = LayerInputs(
            layer=0, num_layers=1, keys=keys, values=keys,
            observation_queries=torch.randn(window, num_heads, group_size, head_dim),
            reconstruction=torch.rand(num_heads, TOKENS), rotary=RotaryTables(angles, angles),
            num_context_tokens=TOKENS, scale=head_dim**-0.5, sink_tokens=4, recent_tokens=16,
            seed=0, keep_ratio=keep_ratio,
        )  # fmt: skip
        needed = peak_bytes(lambda inputs=inputs: scorer.score_layer(inputs))
        needed += 2 * keys.nbytes  # keys and values themselves
        assert needed <= compression_bytes(1, num_heads, head_dim, TOKENS), window


def test_what_quantized_keys_are_freed_of_fits_too():
    keys = torch.randn(2, TOKENS, 64)
    needed = 2 * keys.nbytes + peak_bytes(lambda: KeyTransform.fit(keys, 4))
    assert needed <= compression_bytes(1, 2, 64, TOKENS)


@pytest.mark.parametrize("num_layers", [2, 8])
@pytest.mark.parametrize("budget", ["adaptive", "uniform"])
def test_a_whole_compression_fits(num_layers, budget):
    """Beside the pages; the CPU's compaction copies more of a layer than a GPU's kernel does."""
    num_heads, head_dim, block = 2, 64, 16
    geometry = CacheGeometry(num_layers, num_heads, 1, head_dim, block)
    pool = PagePool(2 * TOKENS // block, num_layers, num_heads)
    pages = torch.randn(pool.num_blocks * num_layers * num_heads, 2 * block * head_dim)
    rule = PrefixRule(0.5, 0, sink_tokens=4, recent_tokens=16, block_size=block)
    plan = rule.plan(TOKENS)
    store = PackedPages(pages, PageCodec.identity(block, head_dim), block, head_dim)
    store.compact = lambda *_: None
    press = Compressor(
        geometry=geometry, pool=pool, store=store, rule=rule, scorer=create_scorer("contrast"),
        budget=budget,
    )  # fmt: skip
    needed = peak_bytes(
        lambda: press.compress(
            source_blocks=range(TOKENS // block),
            target_blocks=range(TOKENS // block, TOKENS // block + plan.num_compressed_blocks),
            plan=plan, observation_queries=None, scale=1.0, seed=0,
        )
    )  # fmt: skip
    assert needed <= compression_bytes(num_layers, num_heads, head_dim, TOKENS)


def test_bytes_are_counted():
    a = torch.zeros(1000)

    def run():
        b = a + 1  # 4,000 bytes
        b = (b * 2).view(10, 100)  # twice that, until the first is gone
        c = b[3]
        del b
        return c.clone()

    assert peak_bytes(run) == 8000
