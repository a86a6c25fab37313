"""What the bridge expects of vLLM, held against a vLLM that need not be installed or run.

Read from the bridge's code: every name of ``symbols.PLACES``, and of its classes every method and
attribute that the bridge overrides, wraps, calls or reads. ``tests/bridge/vllm_contract.json`` has
their signatures; ``tests/bridge/test_contract.py`` holds them against the vLLM that runs.

    python scripts/vllm_contract.py                            # the vLLM of this environment
    python scripts/vllm_contract.py vllm-0.33.0-*.whl          # a wheel, CUDA builds included
    python scripts/vllm_contract.py --write .venv-0.31.0 .venv # after a look at what was printed

A vLLM keeps the record when each signature takes the calls that a recorded one takes, and when each
override of ours takes the calls that vLLM's method takes. ``absent`` stands for what some tested
version has not: the bridge names it without needing it.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
from pathlib import Path

from vllm_source import FUNCTIONS, Found, Sources, constructor, members, signature

from vllm_kvzip.vllm_bridge.symbols import PLACES, SINCE

ROOT = Path(__file__).parent.parent
PACKAGES = ("vllm_kvzip", "scripts/evaluation", "scripts/profiling")
RECORD = ROOT / "tests" / "bridge" / "vllm_contract.json"
SYMBOLS = "vllm_kvzip.vllm_bridge.symbols"
ABSENT = "absent"
Contract = dict[str, list[str]]


def installed_vllm() -> Path:
    """Folder that holds the package of the running environment."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SystemExit("vllm_contract: no vLLM is installed; name a wheel or an environment.")
    return Path(spec.origin).parent.parent


def open_vllm(path: Path) -> Sources:
    """vLLM from a wheel, an environment or a folder of packages, with our bridge beside it."""
    places = {(SYMBOLS, name): place for name, place in PLACES.items()}
    sources = Sources(path, {"vllm", "vllm_kvzip", "scripts"}, places, beside=ROOT)
    if sources.module("vllm") is None:
        raise SystemExit(f"vllm_contract: {path} holds no vLLM.")
    return sources


def bridge_modules() -> dict[str, ast.Module]:
    """Modules of the bridge, and others that take names from its table, by dotted name."""
    found = {}
    for path in (path for folder in PACKAGES for path in sorted((ROOT / folder).rglob("*.py"))):
        text = path.read_text()
        if path.stem != "symbols" and ("vllm_bridge" in path.parts or SYMBOLS in text):
            found[".".join(path.relative_to(ROOT).with_suffix("").parts)] = ast.parse(text)
    return found


def mentions(trees: list[ast.Module]) -> set[str]:
    """Names that the bridge may mean a member of a class by: attributes, methods and texts."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, FUNCTIONS):
            names.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)  # of getattr and setattr, and in tables of what is wrapped
    return {name for name in names if name.isidentifier() and not name.startswith("__")}


def constructed(trees: list[ast.Module]) -> set[str]:
    """Names that the bridge calls, or derives classes from."""
    names = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        for used in (*getattr(node, "bases", ()), getattr(node, "func", None)):
            names.add(getattr(used, "id", ""))
    return names


def direct_mentions(trees: list[ast.Module]) -> dict[str, set[str]]:
    """Attributes asked of a name of the table itself, as in ``envs.VLLM_BATCH_INVARIANT``."""
    names: dict[str, set[str]] = {}
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names.setdefault(node.value.id, set()).add(node.attr)
    return names


def expectations(sources: Sources) -> dict[str, str]:
    """What this vLLM says to each thing that the bridge expects: a signature, or ``absent``."""
    trees = list(bridge_modules().values())
    named, direct, called = mentions(trees), direct_mentions(trees), constructed(trees)
    found: dict[str, str] = {}
    for name, place in PLACES.items():
        target = sources.find_place(place, name)
        if target is None:
            found[name] = ABSENT
            continue
        found[name] = signature(target.node)
        target = sources.annotated(target) or target
        if isinstance(target.node, ast.ClassDef):
            made = constructor(sources, target) if name in called else None
            found[name] = made or "class"
            found |= _members(sources, name, target, named)
        elif isinstance(target.node, ast.Module):
            for attribute in sorted(direct.get(name, ())):
                inner = sources.find(target.module, attribute)
                found[f"{name}.{attribute}"] = signature(inner.node) if inner else ABSENT
    return found


def _members(sources: Sources, name: str, target: Found, named: set[str]) -> dict[str, str]:
    """Members of a class that the bridge names. Of inherited ones the nearest counts."""
    found: dict[str, str] = {}
    for ancestor in sources.lineage(target):
        assert isinstance(ancestor.node, ast.ClassDef)
        own = members(ancestor.node)
        for wanted in sorted(named & set(own)):
            found.setdefault(f"{name}.{wanted}", signature(own[wanted]))
    return found


def version_of(sources: Sources) -> tuple[int, ...]:
    """Of the vLLM that is read; empty where it says none."""
    module = sources.module("vllm._version")
    text = ast.unparse(module.tree) if module else ""
    numbers = re.search(r"__version__ = .*?'(\d+)\.(\d+)", text)
    return tuple(map(int, numbers.groups())) if numbers else ()


def keeps(found: str, recorded: str) -> bool:
    """Whether ``found`` is of the recorded kind, and takes every call that was taken."""
    if "(" not in found or "(" not in recorded:
        return found == recorded
    return found.split("(")[0] == recorded.split("(")[0] and takes(found, recorded)


def takes(found: str, wanted: str) -> bool:
    """Whether each parameter of ``wanted`` finds a place in ``found``, which asks for no more."""
    ours, theirs = (_arguments(text[text.index("(") :]) for text in (found, wanted))
    mine = [*ours.posonlyargs, *ours.args]
    given = [*theirs.posonlyargs, *theirs.args]
    names = {a.arg for a in (*mine, *ours.kwonlyargs)}
    for index, argument in enumerate(given):
        by_position = index < len(mine) or ours.vararg is not None
        if not (by_position or argument.arg in names or ours.kwarg is not None):
            return False
    if any(a.arg not in names and ours.kwarg is None for a in theirs.kwonlyargs):
        return False
    needed = [a for a, d in zip(ours.kwonlyargs, ours.kw_defaults, strict=True) if d is None]
    passed = [a for a, d in zip(theirs.kwonlyargs, theirs.kw_defaults, strict=True) if d is None]
    if {a.arg for a in needed} - {a.arg for a in (*given[: _required(theirs)], *passed)}:
        return False
    return _required(ours) <= _required(theirs)


def _arguments(text: str) -> ast.arguments:
    function = ast.parse(f"def f{text}: pass").body[0]
    assert isinstance(function, ast.FunctionDef)
    return function.args


def _required(arguments: ast.arguments) -> int:
    return len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)


def overrides(sources: Sources) -> dict[str, tuple[str, str]]:
    """Methods of ours that stand before one of vLLM's: ours and vLLM's signature."""
    found: dict[str, tuple[str, str]] = {}
    for module, tree in bridge_modules().items():
        for node in (node for node in tree.body if isinstance(node, ast.ClassDef)):
            ours: dict[str, ast.AST] = {}
            for link in sources.lineage(Found(module, node)):
                assert isinstance(link.node, ast.ClassDef)
                if link.module.split(".")[0] != "vllm":
                    own = [item for item in link.node.body if isinstance(item, FUNCTIONS)]
                    ours = {item.name: item for item in own} | ours
                    continue
                for name, function in members(link.node).items():
                    if name in ours and isinstance(function, FUNCTIONS):
                        pair = (signature(ours[name]), signature(function))
                        found.setdefault(f"{node.name}.{name}", pair)
    return found


def differences(
    sources: Sources, recorded: Contract, found: dict[str, str] | None = None
) -> list[str]:
    """What of the record a vLLM does not keep, a sentence each."""
    found = found or expectations(sources)
    version, problems = version_of(sources), []
    for name, signatures in recorded.items():
        mine, owner = found.get(name, ABSENT), name.split(".")[0]
        known = [text for text in signatures if text != ABSENT or name not in PLACES]
        if owner in SINCE and () < version < SINCE[owner]:
            known = [ABSENT]
        if not any(keeps(mine, text) for text in known):
            what = "missing" if mine == ABSENT else "changed"
            problems.append(f"{what}: {name} is {mine}, and was {' or '.join(known)}")
    problems += [
        f"not in the record: {name} is {found[name]}" for name in found.keys() - recorded.keys()
    ]
    for name, (ours, theirs) in overrides(sources).items():
        if not takes(ours, theirs):
            problems.append(f"an override takes other calls: {name} is {ours}, vLLM's is {theirs}")
    return problems


def make_record(paths: list[Path]) -> Contract:
    """A record that each of some vLLMs keeps; the oldest come first."""
    record: Contract = {}
    each = [expectations(open_vllm(path)) for path in paths]
    for name in sorted(set().union(*each)):
        for found in each:
            mine, known = found.get(name, ABSENT), record.setdefault(name, [])
            if not any(keeps(mine, text) for text in known):
                known.append(mine)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vllm", nargs="*", type=Path, help="wheels, environments or folders")
    parser.add_argument("--write", action="store_true", help="write the record; oldest vLLM first")
    args = parser.parse_args()
    paths = args.vllm or [installed_vllm()]
    if args.write:
        record = make_record(paths)
        lines = (f"{json.dumps(name)}: {json.dumps(known)}" for name, known in record.items())
        RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        print(f"{len(record)} entries in {RECORD.relative_to(ROOT)}")
        return
    recorded = json.loads(RECORD.read_text())
    found = {path: differences(open_vllm(path), recorded) for path in paths}
    for path, problems in found.items():
        print(f"{path}: {len(problems)} differences", *problems, sep="\n  ")
    raise SystemExit(any(found.values()))


if __name__ == "__main__":
    main()
