"""Who may import whom. The rules keep algorithms free of vLLM, and vLLM's drift in one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "vllm_kvzip"
NO_TORCH = ("__init__", "config", "profile", "errors", "metrics")
ALGORITHMS = (
    "scoring",
    "budgeting",
    "selection",
    "compaction",
    "reconstruction",
    "quantization",
)


def imported_names(source):
    """Modules a source imports, ``TYPE_CHECKING`` blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def broken_rules(module, source):
    """Rules that a module of the package breaks, as readable strings.

    ``module`` is dotted, without the package's name: ``scoring.base``, ``vllm_bridge.worker``.
    """
    names = set(imported_names(source))
    roots = {name.split(".")[0] for name in names}
    ours = {name.split(".")[1] for name in names if name.startswith(PACKAGE + ".")}
    room = module.split(".")[0]
    bridge = room == "vllm_bridge"
    if "vllm" in roots and not bridge:
        yield "imports vllm outside vllm_bridge"
    if "vllm_bridge" in ours and not bridge:
        yield "imports vllm_bridge"
    if "torch" in roots and module in NO_TORCH:
        yield "imports torch"
    if room in ALGORITHMS and ours & (set(ALGORITHMS) - {room}):
        yield "imports another algorithm room"
    if room == "kernels" and (ours - {"kernels"} or "pydantic" in roots):
        yield "kernels import the package"
    if "prometheus_client" in roots and module not in ("metrics", "vllm_bridge.stats_export"):
        yield "imports prometheus_client"
    if "os.environ" in source and not bridge and module != "metrics":
        yield "reads the environment"
    if {"scripts", "tests"} & roots:
        yield "imports scripts or tests"


def package_modules():
    for folder, prefix in ((ROOT / PACKAGE, ""), (ROOT / "kernels", "kernels.")):
        for path in sorted(folder.rglob("*.py")):
            dotted = ".".join(path.relative_to(folder).with_suffix("").parts)
            yield prefix + dotted, path


MODULES = dict(package_modules())


@pytest.mark.parametrize("module", list(MODULES))
def test_import_rules(module):
    assert list(broken_rules(module, MODULES[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("scoring.base", "from vllm.config import VllmConfig", "outside vllm_bridge"),
        ("pipeline", "import vllm_kvzip.vllm_bridge.worker", "imports vllm_bridge"),
        ("config", "import torch", "imports torch"),
        ("selection", "from vllm_kvzip.scoring import base", "another algorithm room"),
        ("quantization.nf4", "import vllm_kvzip.compaction", "another algorithm room"),
        ("kernels.decode", "from vllm_kvzip.core import KeepPlan", "kernels import"),
        ("pipeline", "from prometheus_client import Counter", "prometheus_client"),
        ("config", "import os\nos.environ['X']", "environment"),
        ("core", "from tests import x", "scripts or tests"),
    ],
)
def test_each_rule_can_be_broken(module, source, rule):
    assert any(rule in found for found in broken_rules(module, source))


def test_vllm_comes_with_type_checking_only_outside_its_room_too():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm import LLM\n"
    assert list(broken_rules("core", source)) == ["imports vllm outside vllm_bridge"]
