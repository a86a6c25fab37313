"""Who may import whom. The rules keep algorithms free of vLLM, and vLLM's drift in one room."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PACKAGE = "vllm_kvzip"
METRIC_READERS = ("metrics", "vllm_bridge.stats_export", "evaluation.engines")
SCRIPT_ROOMS = {path.parent.name for path in (ROOT / "scripts").glob("*/__init__.py")}
NO_TORCH = (
    "__init__",
    "config",
    "errors",
    "metrics",
    "registry",
    "planning.request_options",
    "head_profiles.head_profile",
    "command.contexts",
    "command.main",
    "command.read",
    "command.report",
    "command.server_calls",
    "evaluation.quality.command",
    "report.bitmaps",
    "report.explanation",
    "report.page",
    "report.passages",
)
FLOORS = (
    {"kernels", "model"},
    {"root"},
    {"planning", "quantization", "client"},
    {"head_profiles", "storage", "budgeting", "contexts", "report"},
    {"scoring"},
    {"pipeline"},
    {"vllm_bridge"},
    {"vllm_bridge.contexts", "vllm_bridge.connectors"},
    {"vllm_bridge.server", "vllm_bridge.scheduler"},
    {"vllm_bridge.cache"},
    {"vllm_bridge.start"},
    {"vllm_bridge.passes"},
    {"vllm_bridge.attention"},
    {"vllm_bridge.worker"},
    {"evaluation"},
    {"profiling"},
    {"command"},
)
"""Rooms from the ground up: one may import what is below it, and nothing beside or above it."""
MAPPED = {
    "kernels": "kernels",
    "evaluation": "scripts/evaluation",
    "profiling": "scripts/profiling",
}
"""Rooms that lie elsewhere in the repository."""
TOOLS = {"evaluation", "profiling", "command"}  # which start engines and processes
MAX_FILES = 12  # of a room, its ``__init__`` aside


def imported_names(source):
    """Modules a source imports, ``TYPE_CHECKING`` blocks included."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(module):
    """The room of a dotted module without the package's name; files of the top level: ``root``."""
    parts = module.split(".")
    if module == "pipeline":
        return "pipeline"
    if parts[0] == "vllm_bridge" and ".".join(parts[:2]) in set().union(*FLOORS):
        return ".".join(parts[:2])
    return parts[0] if parts[0] in set().union(*FLOORS) else "root"


def floor_of(room):
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def broken_rules(module, source):
    """Rules that a module of the package breaks, as readable strings.

    ``module`` is dotted, without the package's name: ``scoring.base``, ``vllm_bridge.settings``.
    """
    names = set(imported_names(source))
    roots = {name.split(".")[0] for name in names}
    ours = {room_of(name.removeprefix(PACKAGE + ".")) for name in names if name.startswith(PACKAGE)}
    room = room_of(module)
    bridge = room.startswith("vllm_bridge")
    if "vllm" in roots:
        yield "imports vllm; take names from vllm_bridge.symbols"
    for other in ours - {room}:
        if floor_of(other) >= floor_of(room):
            yield f"{room} imports {other}, which is not below it"
    if "torch" in roots and (module in NO_TORCH or room == "client"):
        yield "imports torch"
    if room == "kernels" and (ours - {"kernels"} or "pydantic" in roots):
        yield "kernels import the package"
    if "prometheus_client" in roots and module not in METRIC_READERS:
        yield "imports prometheus_client"
    if "os.environ" in source and not bridge and module != "metrics" and room not in TOOLS:
        yield "reads the environment"
    if {"scripts", "tests", *MAPPED, *SCRIPT_ROOMS} & roots:
        yield "imports scripts or tests"


def package_modules():
    mapped = [(ROOT / folder, f"{room}.") for room, folder in MAPPED.items()]
    for folder, prefix in ((ROOT / PACKAGE, ""), *mapped):
        for path in sorted(folder.rglob("*.py")):
            dotted = ".".join(path.relative_to(folder).with_suffix("").parts)
            yield prefix + dotted, path


MODULES = dict(package_modules())


@pytest.mark.parametrize("module", list(MODULES))
def test_import_rules(module):
    assert list(broken_rules(module, MODULES[module].read_text())) == []


def test_every_room_has_a_floor_and_few_files():
    rooms = {}
    for module, path in MODULES.items():
        if path.stem != "__init__":
            rooms.setdefault(path.parent.relative_to(ROOT), []).append(module)
    assert set(map(room_of, MODULES)) == set().union(*FLOORS)
    assert {room: files for room, files in rooms.items() if len(files) > MAX_FILES} == {}


@pytest.mark.parametrize(
    ("module", "source", "rule"),
    [
        ("scoring.base", "from vllm.config import VllmConfig", "imports vllm"),
        ("vllm_bridge.settings", "from vllm.config import VllmConfig", "imports vllm"),
        ("pipeline", "import vllm_kvzip.vllm_bridge.worker", "not below"),
        ("config", "import torch", "imports torch"),
        ("client.text.parts", "import torch", "imports torch"),
        ("client.server", "import vllm_kvzip.vllm_bridge.settings", "not below"),
        ("budgeting.selection", "from vllm_kvzip.scoring import base", "not below"),
        ("quantization.nf4", "import vllm_kvzip.planning.tiers", "not below"),
        ("kernels.decode", "from vllm_kvzip.core import KeepPlan", "kernels import"),
        ("pipeline", "from prometheus_client import Counter", "prometheus_client"),
        ("config", "import os\nos.environ['X']", "environment"),
        ("core", "from tests import x", "scripts or tests"),
        ("evaluation.engines", "from gpu.clone import ROOT", "scripts or tests"),
        ("evaluation.engines", "from vllm import LLM", "imports vllm"),
        ("vllm_bridge.worker.x", "from vllm_kvzip.evaluation import engines", "not below"),
        ("evaluation.engines", "import vllm_kvzip.profiling.command", "not below"),
    ],
)
def test_each_rule_can_be_broken(module, source, rule):
    assert any(rule in found for found in broken_rules(module, source))


def test_names_for_annotations_come_from_there_too():
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vllm import LLM\n"
    assert list(broken_rules("core", source)) == [
        "imports vllm; take names from vllm_bridge.symbols"
    ]
