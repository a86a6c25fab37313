"""What vLLM will make of models whose layers differ, known from their configuration alone."""

import json

import pytest
from card import pretend_a_card
from document_families import DOCUMENT, SHAPES, Shape, plan_of, with_families
from random_model import KINDS, SHAPE
from startup import ON, engine_config, refusal
from vllm.engine.arg_utils import EngineArgs

from vllm_kvzip.config import KVzipConfig
from vllm_kvzip.model.cache_shares import AlikeLayers
from vllm_kvzip.vllm_bridge import platforms
from vllm_kvzip.vllm_bridge.cache.cache_spec import HeadPageSpec
from vllm_kvzip.vllm_bridge.settings import Settings, cache_shape
from vllm_kvzip.vllm_bridge.start import options
from vllm_kvzip.vllm_bridge.start.cache_plan import plan_cache
from vllm_kvzip.vllm_bridge.symbols import FullAttentionSpec, groups_of_equal_pages

pytestmark = pytest.mark.vllm

NO_TOKENIZER = "--skip-tokenizer-init"
FULL, SLIDING = "full_attention", "sliding_attention"
PUBLISHED = {shape.model: shape for shape in SHAPES}


def mixed(layers, window=64):
    """A small model whose layers differ."""
    return Shape(
        "small", "Qwen2ForCausalLM", "qwen2", layers, "", (4, 4, 32), 1024,
        {"sliding_window": window, "use_sliding_window": True, "vocab_size": 512},
    )  # fmt: skip


def write(folder, shape):
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return folder


def sizes(plan):
    return [len(group.layer_names) for group in plan.groups]


def test_layers_that_are_alike_are_one_group():
    plan = plan_cache(engine_config(*ON))
    assert sizes(plan) == [4]
    assert plan.others == [] and len(plan.full_groups) == 1
    assert plan.blocks_of_others(1000) == 0
    assert plan.pool_blocks(100) == 100


def test_gemma_3_27b():
    """Six groups of windows; each block has room for the ten layers of the compressed group."""
    plan = plan_of(PUBLISHED["Gemma 3 27B"])
    assert sizes(plan) == [10, 9, 9, 9, 9, 8, 8]
    assert plan.others == [AlikeLayers(n, window=1024) for n in (9, 9, 9, 9, 8, 8)]
    assert plan.block_size == 32
    assert plan.block_bytes == 10 * 2 * 32 * 16 * 128 * 2  # layers, K and V, tokens, heads, size
    assert plan.blocks_of_others(512) == 6 * 16
    assert plan.blocks_of_others(131072) == 6 * (1024 // 32 + 1)


@pytest.mark.parametrize("model", ["LFM2 1.2B", "Qwen3-Next 80B", "Granite 4.0 H Small"])
def test_states_fit_into_blocks(model):
    plan = plan_of(PUBLISHED[model])
    (full,) = plan.full_groups
    pages = {group.kv_cache_spec.page_size_bytes for group in plan.groups}
    assert pages == {full.kv_cache_spec.page_size_bytes}
    assert all(layers.state_blocks == 2 for layers in plan.others)  # prefix caching keeps one more
    assert plan.block_size % 32 == 0
    assert (plan.block_size == 32) == (model == "LFM2 1.2B")
    state = next(g.kv_cache_spec for g in plan.groups if g is not full)
    a_unit_less = pages.pop() * (plan.block_size - 32) // plan.block_size
    assert a_unit_less < state.real_page_size_bytes  # no larger than it must be


def test_blocks_of_a_model_that_engines_were_run_with(tmp_path):
    """`tests/e2e/test_recurrent_layers.py` sees the same in an engine."""
    kind = KINDS["qwen3-next"]
    layers = len(kind.fields["layer_types"])
    fields = {**SHAPE, "num_hidden_layers": layers, **kind.fields}
    kind.config_class(**fields, architectures=["Qwen3NextForCausalLM"]).save_pretrained(tmp_path)
    config = engine_config(*ON, NO_TOKENIZER, "--dtype", "bfloat16", model=tmp_path)
    assert plan_cache(config).block_size == 160
    assert cache_shape(config)[0] == 32
    config.cache_config.effective_attention_block_size = 160  # as vLLM tells the API server
    assert cache_shape(config)[0] == 160
    unshared = engine_config(
        *ON, NO_TOKENIZER, "--dtype", "bfloat16", "--no-enable-prefix-caching", model=tmp_path
    )
    assert {layers.state_blocks for layers in plan_cache(unshared).others} == {1}


def test_specs_of_compressed_layers_are_grouped_alike(tmp_path):
    folder = write(tmp_path, mixed([SLIDING, SLIDING, FULL] * 2))
    config = engine_config(*ON, NO_TOKENIZER, model=folder)
    plan, settings = plan_cache(config), Settings.from_vllm_config(config)
    specs = {
        name: HeadPageSpec.from_full_attention(group.kv_cache_spec, settings, config)
        if isinstance(group.kv_cache_spec, FullAttentionSpec)
        else group.kv_cache_spec
        for group in plan.groups
        for name in group.layer_names
    }
    groups = groups_of_equal_pages(specs)
    assert [len(group.layer_names) for group in groups] == sizes(plan) == [2, 2, 2]
    assert [type(group.kv_cache_spec) is HeadPageSpec for group in groups] == [True, False, False]


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ([FULL] * 3 + [SLIDING] * 2, 2),
        ([FULL] * 4 + [SLIDING] * 3, 1),
        ([FULL] * 6 + [SLIDING] * 2, 3),
    ],
)
def test_several_groups_of_full_attention_are_refused(capsys, tmp_path, layers, groups):
    """vLLM's groups have as many layers as the kind that has the fewest."""
    folder = write(tmp_path, mixed(layers))
    if groups == 1:
        assert engine_config(*ON, NO_TOKENIZER, model=folder)
        return
    full = layers.count(FULL)
    assert (
        f"does not support {full} layers of full attention beside 2 others, which vLLM splits into "
        f"{groups} KV cache groups of full attention; run Qwen2ForCausalLM without "
        f"--kv-compression."
    ) in refusal(capsys, *ON, NO_TOKENIZER, model=folder)


def test_settings_are_checked_with_the_block_size_of_the_workers(capsys, tmp_path):
    folder = write(tmp_path, PUBLISHED["Granite 4.0 H Small"])
    flags = (*ON, NO_TOKENIZER, "--dtype", "bfloat16")
    config = engine_config(*flags, model=folder)
    assert cache_shape(config)[0] == 32
    assert cache_shape(plan_cache(config).vllm_config)[0] == 1056
    assert cache_shape(config)[0] == 32  # it stays as it is
    assert "prefill_budget=1024 must be at least 2112" in refusal(
        capsys, *flags, "--kv-compression-config.prefill_budget", "1024", model=folder
    )


@pytest.fixture
def on_a_card(monkeypatch):
    pretend_a_card(monkeypatch)


@pytest.mark.parametrize(
    ("model", "block_size", "pages_per_head"),
    [("Gemma 3 27B", 16, 1), ("LFM2 1.2B", 16, 1), ("Qwen3-Next 80B", 1056, 66)],
)
def test_large_blocks_hold_small_pages_on_gpus(
    tmp_path, on_a_card, model, block_size, pages_per_head
):
    folder = write(tmp_path, PUBLISHED[model])
    config = EngineArgs(
        str(folder), skip_tokenizer_init=True, dtype="bfloat16", block_size=16
    ).create_engine_config()
    options.configure(config, KVzipConfig(mode="mixed", keep_bytes_ratio=0.3))
    assert config.parallel_config.worker_cls == platforms.GPU.worker_class
    plan = plan_cache(config)
    assert plan.block_size == block_size
    rule = Settings.from_vllm_config(config).rule(*cache_shape(plan.vllm_config))
    assert rule.pages_per_head == pages_per_head
    tiers = rule.plan(32 * 1056).tiers
    assert tiers[0].page_tokens == 16
    assert tiers[1].page_tokens * tiers[1].split > 16
    assert tiers[1].num_pages == tiers[1].num_blocks * pages_per_head * tiers[1].split


def test_the_table_of_families_is_that_of_the_script():
    text = DOCUMENT.read_text()
    assert with_families(text) == text, "run scripts/document_families.py"
