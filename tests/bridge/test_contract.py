"""The vLLM that runs has what the bridge expects of one; see `scripts/vllm_contract.py`."""

import ast
import json
import subprocess
import sys

import pytest
import vllm_contract as contract
from engine_job import MODEL
from startup import ON, engine_config, refusal

from vllm_kvzip.errors import UnsupportedError
from vllm_kvzip.vllm_bridge import symbols, versions

RECORDED = json.loads(contract.RECORD.read_text())


@pytest.fixture(scope="module")
def installed():
    return contract.open_vllm(contract.installed_vllm())


@pytest.fixture(scope="module")
def found(installed):
    return contract.expectations(installed)


def test_the_running_vllm_keeps_the_record(installed, found):
    """If not: read what changed in vLLM, mend the bridge, then write the record again."""
    assert contract.differences(installed, RECORDED, found) == []
    assert len(RECORDED) > 700


@pytest.mark.parametrize(
    ("name", "recorded", "said"),
    [
        ("KVCacheManager.get_computed_blocks", "(self)", "changed"),
        ("KVCacheManager.get_computed_blocks", "(self, request, salt, pepper)", "changed"),
        ("KVCacheManager.get_computed_blocks", "classmethod (cls, request)", "changed"),
        ("AsyncLLM.generate_more", "(self)", "missing"),
        ("EngineCoreThing", "class", "missing"),
    ],
)
def test_what_changed_or_is_gone_is_told(installed, found, name, recorded, said):
    told = contract.differences(installed, {**RECORDED, name: [recorded]}, found)
    assert len(told) == 1
    assert told[0].startswith(f"{said}: {name} is ")


def test_what_the_bridge_names_and_the_record_has_not_is_told(installed, found):
    shorter = {name: known for name, known in RECORDED.items() if name != "Scheduler.schedule"}
    (told,) = contract.differences(installed, shorter, found)
    assert told.startswith("not in the record: Scheduler.schedule is (self")


def test_the_methods_that_matter_most_are_among_them():
    for name in (
        "BlockPool.get_new_blocks",
        "EngineArgs.create_engine_config",
        "FullAttentionManager.cache_blocks",
        "InputProcessor.process_inputs",
        "KVCacheManager.allocate_slots",
        "OpenAIServingResponses._generate_with_builtin_tools",
        "Scheduler._preempt_request",
        "CPUWorker.execute_model",
        "TritonAttentionImpl.forward",
        "envs.VLLM_BATCH_INVARIANT",
    ):
        assert name in RECORDED


@pytest.mark.parametrize(
    ("ours", "theirs", "fits"),
    [
        ("(self, request)", "(self, request)", True),
        ("(self, request, most=...)", "(self, request)", True),
        ("(self, request, most)", "(self, request)", False),
        ("(self, request)", "(self, request, most=...)", False),
        ("(self, *args, **kwargs)", "(self, request, *, most=...)", True),
        ("(self, *args)", "(self, request, *, most=...)", False),
        ("(self, request, *, most)", "(self, request, most)", True),
        ("(self, other)", "(self, request)", True),
    ],
)
def test_one_signature_takes_the_calls_of_another(ours, theirs, fits):
    assert contract.takes(ours, theirs) == fits


def test_every_override_takes_vllms_calls(installed):
    found = contract.overrides(installed)
    assert {"HeadPageManager.cache_blocks", "HeadPageCPUWorker.execute_model"} <= set(found)
    assert [name for name, pair in found.items() if not contract.takes(*pair)] == []


def used_names():
    """Names that the bridge takes from the table."""
    for tree in contract.bridge_modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == contract.SYMBOLS:
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "symbols":
                yield node.attr


def test_every_name_of_the_table_is_used_and_none_is_missing():
    of_the_module = {"check_symbols", "is_before", "COMMON", "SERVER", "CPU", "GPU"}
    assert set(used_names()) - of_the_module == set(symbols.PLACES)
    groups = [symbols.COMMON, symbols.SERVER, symbols.CPU, symbols.GPU]
    groups += [symbols.TOOLS, symbols.TYPES]
    assert len(symbols.PLACES) == sum(map(len, groups))  # none stands twice


NEEDED = {**symbols.COMMON, **symbols.SERVER, **symbols.CPU}.keys() - symbols.SINCE.keys()


def test_a_name_that_moved_is_one_sentence(monkeypatch, capsys):
    """Whichever it is, of those that a server on the CPU needs."""
    for name in sorted(NEEDED - {"vllm_version"}):
        with monkeypatch.context() as patch:
            patch.setitem(symbols.PLACES, name, "vllm.not_there")
            with pytest.raises(UnsupportedError, match=f"cannot import name '{name}' from vLLM"):
                versions.check_version(serves=True)
    monkeypatch.setitem(symbols.PLACES, "Scheduler", "vllm.not_there vllm.not_there_either")
    said = refusal(capsys, *ON)
    assert "does not fit vLLM" in said
    assert "install a tested version: 0.31.0, 0.32.0." in said


def test_a_server_without_compression_does_not_mind(monkeypatch):
    monkeypatch.setitem(symbols.PLACES, "Scheduler", "vllm.not_there")
    assert engine_config().scheduler_config.scheduler_cls is None
    with pytest.raises(SystemExit):
        engine_config(*ON)


@pytest.mark.slow
def test_vllm_serve_says_it_and_ends(tmp_path):
    """A name that the first module to be loaded needs, in a process that has loaded none."""
    code = (
        "import sys; from vllm_kvzip.vllm_bridge import symbols;"
        "symbols.PLACES['init_logger'] = 'vllm.not_there';"
        "from vllm.entrypoints.cli.main import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "serve", str(MODEL), *ON]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot import name 'init_logger' from vLLM" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
