"""Start-up: which KV connectors go together with compression."""

import json
import sys

import pytest
from startup import ON, engine_config, refusal
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

from vllm_kvzip.vllm_bridge.connectors.accepted import EXAMPLE, OFFLOADING

pytestmark = pytest.mark.vllm

OTHERS = sorted(set(KVConnectorFactory._registry) - {EXAMPLE, OFFLOADING})
OWN = """
from vllm.distributed.kv_transfer.kv_connector.v1.example_connector import ExampleConnector

class Silent(ExampleConnector):
    pass

class Declaring(ExampleConnector):
    kvzip_stores_raw_blocks = True

class OffloadingConnector(ExampleConnector):
    '''Called like one of vLLM's.'''
"""


def transfer(name, role="kv_both", **values):
    value = {"kv_connector": name, "kv_role": role, **values}
    return ["--kv-transfer-config", json.dumps(value)]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Values that name a module of own connectors."""
    (tmp_path / "own_connectors.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield {"kv_connector_module_path": "own_connectors"}
    sys.modules.pop("own_connectors", None)


def test_offloading_goes_together_with_compression():
    config = engine_config(*ON, "--kv-offloading-size", "0.5")
    assert config.kv_transfer_config.kv_connector == OFFLOADING
    assert config.scheduler_config.scheduler_cls is not None


def test_the_example_connector_needs_whole_prompts(capsys):
    flags = ["--max-num-batched-tokens", "2048", "--no-enable-chunked-prefill"]
    config = engine_config(*ON, *transfer(EXAMPLE), *flags)
    assert config.kv_transfer_config.kv_connector == EXAMPLE
    said = refusal(capsys, *ON, *transfer(EXAMPLE), "--enable-chunked-prefill")
    assert "add --no-enable-chunked-prefill" in said
    said = refusal(capsys, *ON, *transfer(EXAMPLE), *flags, "--enable-lora")
    assert f"{EXAMPLE} with --enable-lora, whose adapters it does not tell apart" in said


def test_others_are_refused_by_name():
    """Short of vLLM's own checks, which want more packages and flags for some of them."""
    assert "NixlConnector" in OTHERS
    assert "MultiConnector" in OTHERS
    config = engine_config(*ON, "--kv-offloading-size", "0.5")
    from vllm_kvzip.vllm_bridge.connectors.accepted import connector_problems

    for name in OTHERS:
        config.kv_transfer_config.kv_connector = name
        (said,) = [text for present, text in connector_problems(config, False) if present]
        assert said.startswith(f"the KV connector {name}; use OffloadingConnector (")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            transfer("DecodeBenchConnector"),
            "does not support the KV connector DecodeBenchConnector; use OffloadingConnector "
            "(--kv-offloading-size with the backend native), ExampleConnector, or a connector of "
            "your own whose class declares kvzip_stores_raw_blocks.",
        ),
        (transfer(OFFLOADING, "kv_producer"), "does not support kv_role kv_producer, which"),
        (
            ["--kv-offloading-size", "1", "--speculative-config",
             '{"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}'],
            "the KV connector OffloadingConnector with speculative decoding yet; remove --kv-",
        ),
        (
            ["--kv-offloading-size", "1", "--pipeline-parallel-size", "2", "--no-enforce-eager"],
            "the KV connector OffloadingConnector with --pipeline-parallel-size 2 yet; remove",
        ),
        (
            ["--kv-offloading-size", "1", "--kv-compression-config.mode", "quantize"],
            "mode quantize does not work with the KV connector OffloadingConnector yet; remove one",
        ),
        (
            ["--kv-offloading-size", "1", "--kv-compression-config",
             '{"prefill_budget": 256, "scorer": "keydiff"}'],
            "prefill_budget does not work with the KV connector OffloadingConnector yet",
        ),
        (
            ["--kv-offloading-size", "1", "--kv-compression-config.scorer", "kvzip"],
            "scorer kvzip does not work with the KV connector OffloadingConnector yet",
        ),
    ],
)  # fmt: skip
def test_what_is_refused_is_said_in_one_sentence(flags, message, capsys):
    assert message in refusal(capsys, *ON, *flags)


def test_context_files_are_refused(tmp_path, capsys):
    flags = ["--kv-offloading-size", "1", "--kv-compression-config.contexts_dir", str(tmp_path)]
    assert "contexts_dir does not work with the KV connector" in refusal(capsys, *ON, *flags)


def test_a_connector_of_ones_own_must_declare_what_it_does(own, capsys):
    flags = ["--max-num-batched-tokens", "2048", "--no-enable-chunked-prefill"]
    config = engine_config(*ON, *transfer("Declaring", **own), *flags)
    assert config.kv_transfer_config.kv_connector == "Declaring"
    for name in ("Silent", OFFLOADING):
        said = refusal(capsys, *ON, *transfer(name, **own), *flags)
        assert f"the KV connector {name}; use" in said
