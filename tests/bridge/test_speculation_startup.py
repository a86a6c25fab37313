"""Start-up: which methods of speculative decoding go together with compression."""

import json
from types import SimpleNamespace

import pytest
import torch
from eagle_head import write_eagle_head
from engine_job import MODEL
from startup import ON, engine_config, refusal
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_kvzip.core import CacheGeometry
from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge.attention.batches import QuerySpan
from vllm_kvzip.vllm_bridge.attention.draft_layers import DraftDescriber
from vllm_kvzip.vllm_bridge.cache.layer_checks import check_draft_layers
from vllm_kvzip.vllm_bridge.drafts import rule_with_drafts
from vllm_kvzip.vllm_bridge.settings import Settings
from vllm_kvzip.vllm_bridge.start.cache_plan import plan_cache
from vllm_kvzip.vllm_bridge.start.speculation import speculation_problems
from vllm_kvzip.vllm_bridge.worker.observation import QueryObservation

pytestmark = pytest.mark.vllm

WINDOWED = MODEL.parent / "tiny-windowed"
ITSELF = {"method": "draft_model", "model": str(MODEL)}
NGRAM = {"method": "ngram", "prompt_lookup_max": 2}


def speculation(**values):
    return ("--speculative-config", json.dumps({"num_speculative_tokens": 2, **values}))


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    head = write_eagle_head(tmp_path_factory.mktemp("eagle") / "head")
    return {"method": "eagle", "model": str(head)}


def test_methods_that_go_together_with_compression(eagle):
    for values in (NGRAM, ITSELF, eagle):
        config = engine_config(*ON, *speculation(**values))
        assert config.speculative_config.method == values["method"]


@pytest.mark.parametrize(
    ("flags", "values", "message"),
    [
        ((), {"method": "ngram_gpu", "prompt_lookup_max": 2},
         "does not support speculative method ngram_gpu yet; use one of ngram, suffix, "
         "draft_model, eagle, eagle3, mtp, or none."),
        (("--kv-compression-config.profile", "build"), ITSELF,
         "profile build does not work with a draft model yet"),
        (("--kv-compression-config.prefill_budget", "640"), ITSELF,
         "prefill_budget does not work with speculative method draft_model yet; use ngram"),
        (("--kv-compression-config.decode_budget", "640"), ITSELF,
         "decode_budget does not work with speculative method draft_model yet; use ngram"),
    ],
)  # fmt: skip
def test_what_does_not_is_one_sentence(capsys, flags, values, message):
    assert message in refusal(capsys, *ON, *flags, *speculation(**values))


def test_a_draft_beside_layers_that_differ_is_refused(capsys):
    said = refusal(capsys, *ON, *speculation(**ITSELF), model=WINDOWED)
    assert "speculative method draft_model beside layers with a sliding window or a state" in said


def test_a_draft_with_other_heads_is_refused(capsys, eagle, tmp_path):
    folder = write_eagle_head(tmp_path / "head")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_key_value_heads": 2}))
    said = refusal(capsys, *ON, *speculation(**{**eagle, "model": str(folder)}))
    assert "8 query heads and 2 KV heads of size 32, where the model's have 8, 4 and 32" in said


def refused(config):
    return [words for present, words in speculation_problems(config, False) if present]


def test_other_ways_to_run_a_draft_are_refused(monkeypatch, eagle):
    config = engine_config(*speculation(**eagle))
    assert refused(config) == []
    config.speculative_config.parallel_drafting = True
    config.speculative_config.enable_adaptive_verification = True
    assert refused(config) == [
        "speculative method eagle with parallel drafting yet; set parallel_drafting to false",
        "speculative method eagle with adaptive verification yet; set "
        "enable_adaptive_verification to false",
    ]


def test_several_mtp_layers_write_into_the_prefix_on_runner_v2(monkeypatch, eagle):
    config = engine_config(*speculation(**eagle))
    speculative = config.speculative_config
    speculative.method = "mtp"
    speculative.draft_model_config.hf_config.num_nextn_predict_layers = 2
    assert refused(config) == []
    monkeypatch.setattr(type(config), "use_v2_model_runner", True)
    (said,) = refused(config)
    assert said.startswith("several MTP layers on vLLM's model runner V2 yet, which computes")
    speculative.num_speculative_tokens = 1
    assert refused(config) == []


SHAPE = {"block_size": 32, "num_kv_heads": 4, "head_size": 32, "dtype": torch.float32}
FULL, NARROW = FullAttentionSpec(**SHAPE), SlidingWindowSpec(**SHAPE, sliding_window=64)


def test_draft_layers_come_last_and_beside_full_attention_only():
    check_draft_layers({"a": FULL, "b": NARROW}, ())
    check_draft_layers({"a": FULL, "b": FULL, "c": FULL}, {"b", "c"})
    for specs, drafts in (
        ({"a": FULL, "b": FULL}, {"a"}),
        ({"a": FULL, "b": NARROW}, {"b"}),
        ({"a": FULL, "b": NARROW, "c": FULL}, {"c"}),
    ):
        with pytest.raises(UnsupportedError, match="does not support a draft model beside layers"):
            check_draft_layers(specs, drafts)


def test_a_scorer_never_sees_a_drafts_queries():
    states, split = {}, object()
    describer = DraftDescriber(states, lambda common: split if common == "mixed" else None)
    assert not describer.has_work
    states["0"] = object()
    assert describer.has_work
    assert describer.describe_step("mixed").split is split
    assert describer.describe_step("mixed").spans == ()
    assert describer.describe_step("dense") is None


def test_queries_of_a_drafts_layers_are_not_kept():
    """Runner V2 gives a draft's first step the metadata of the target, which asks for them."""
    geometry = CacheGeometry(1, 2, 1, 8, 16)
    observation = QueryObservation(geometry, {"target": 0, "draft": 1}, window=4)
    query, spans = torch.zeros(3, 2, 8), (QuerySpan("0", 0, 2),)
    for name, kept in (("draft", 0), ("target", 1)):
        observation.keep(SimpleNamespace(layer_name=name), query, spans, query.dtype)
        assert len(observation) == kept


@pytest.mark.parametrize(("values", "drafts"), [(NGRAM, 0), (ITSELF, 4)])
def test_the_plan_knows_of_a_drafts_layers(values, drafts):
    """So the doctor and the endpoint of contexts tell the blocks that the workers will hold."""
    config = engine_config(*ON, "--kv-compression-config.keep_ratio", "0.3", *speculation(**values))
    (group,) = plan_cache(config).groups
    assert len(group.layer_names) == 4 + drafts
    rule = rule_with_drafts(Settings.from_vllm_config(config).rule(32, 32, 4), config)
    plan = rule.plan(640)  # 20 blocks, of which a model alone keeps 6
    assert plan.num_compressed_blocks == (13 if drafts else 6)
    assert plan.num_full_blocks == 6
