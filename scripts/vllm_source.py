"""Python packages read without importing them, from a folder or from a wheel.

So the CUDA build of a release that runs nowhere here can be read like the one that is installed.
"""

from __future__ import annotations

import ast
import zipfile
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MARK = "..."  # stands for any default


@dataclass(frozen=True, eq=False)
class Found:
    """A definition.

    Attributes:
        module: dotted name of the module that has it.
        node: class, function, assignment, or a module's whole tree.
    """

    module: str
    node: ast.AST


@dataclass
class Module:
    """Names of a module's top level, whatever ``if`` or ``try`` they stand in."""

    tree: ast.Module
    is_package: bool
    defined: dict[str, ast.AST] = field(default_factory=dict)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)


class Sources:
    """Modules of some packages.

    Args:
        path: a folder that holds packages, a virtual environment, or a wheel.
        roots: names of the packages; what they import from others is not followed.
        places: of names that a package imports through a table: ``(module, name)`` -> where they
            are found, as ``module`` or ``module:name`` with spaces between alternatives.
        beside: another folder to look into.
    """

    def __init__(
        self,
        path: Path,
        roots: set[str],
        places: dict[tuple[str, str], str] | None = None,
        beside: Path | None = None,
    ) -> None:
        self.roots, self.places = roots, places or {}
        self._readers = [_reader(path)] + ([_reader(beside)] if beside else [])
        self.module = cache(self._module)
        self._found: dict[tuple[str, str | None], Found | None] = {}

    def _module(self, name: str) -> Module | None:
        if name.split(".")[0] not in self.roots:
            return None
        stem = name.replace(".", "/")
        for read in self._readers:
            for file, is_package in ((f"{stem}/__init__.py", True), (f"{stem}.py", False)):
                if (text := read(file)) is not None:
                    return _parse(text, name, is_package)
        return None

    def find(self, module: str, name: str | None) -> Found | None:
        """The definition behind a name, through imports, aliases and stars.

        Args:
            module: dotted.
            name: in it; None: the module itself.
        """
        if (module, name) not in self._found:
            self._found[module, name] = None  # for names that lead back to themselves
            self._found[module, name] = self._find(module, name)
        return self._found[module, name]

    def _find(self, module: str, name: str | None) -> Found | None:
        if name is not None and (module, name) in self.places:
            return self.find_place(self.places[module, name], name)
        parsed = self.module(module)
        if parsed is None:
            return None
        if name is None:
            return Found(module, parsed.tree)
        if node := parsed.defined.get(name):
            value = getattr(node, "value", None)
            if isinstance(node, ast.Assign) and isinstance(value, ast.Name) and value.id != name:
                return self.find(module, value.id) or Found(module, node)
            return Found(module, node)
        if name in parsed.imported:
            origin, wanted = parsed.imported[name]
            return self.find(origin, wanted) or self.find(f"{origin}.{wanted}", None)
        for origin in parsed.stars:
            if found := self.find(origin, name):
                return found
        return self.find(f"{module}.{name}", None)

    def find_place(self, places: str, name: str) -> Found | None:
        """The first of some places, ``module`` or ``module:name``, that has a name."""
        for place in places.split():
            module, _, other = place.partition(":")
            if found := self.find(module, other or name):
                return found
        return None

    def lineage(self, found: Found) -> list[Found]:
        """A class and its bases, as far as they are in these packages; nearest first."""
        result: list[Found] = []
        if not isinstance(found.node, ast.ClassDef):
            return result
        result.append(found)
        for base in found.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            parent = self._resolve(found.module, expression)
            for ancestor in self.lineage(parent) if parent else []:
                result = [known for known in result if known.node is not ancestor.node]
                result.append(ancestor)
        return result

    def _resolve(self, module: str, expression: ast.AST) -> Found | None:
        if isinstance(expression, ast.Name):
            return self.find(module, expression.id)
        if isinstance(expression, ast.Attribute):
            if owner := self._resolve(module, expression.value):
                if isinstance(owner.node, ast.Module):
                    return self.find(owner.module, expression.attr)
        return None

    def annotated(self, found: Found) -> Found | None:
        """The class that a name is annotated with; None where that is unknown."""
        note = found.node.annotation if isinstance(found.node, ast.AnnAssign) else None
        return self._resolve(found.module, note) if note is not None else None


@cache
def members(owner: ast.ClassDef) -> dict[str, ast.AST]:
    """What a class's own body has: functions, assignments, and attributes of ``self``."""
    found: dict[str, ast.AST] = {}
    for node in _flat(owner.body):
        if isinstance(node, FUNCTIONS):
            found.setdefault(node.name, node)
        for target in _targets(node):
            found.setdefault(target, node)
    for inner in ast.walk(owner):
        if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
            if isinstance(inner.value, ast.Name) and inner.value.id == "self":
                found.setdefault(inner.attr, inner)
    return found


def signature(node: ast.AST) -> str:
    """A function's parameters without annotations, with ``...`` for each default.

    Of a method, its kind goes before. What is no function is an ``attribute``.
    """
    if not isinstance(node, FUNCTIONS):
        return "attribute"
    kinds = [getattr(item, "id", getattr(item, "attr", "")) for item in node.decorator_list]
    if {"property", "cached_property"} & set(kinds):
        return "attribute"
    kind = "".join(f"{kind} " for kind in ("classmethod", "staticmethod") if kind in kinds)
    return f"{kind}({parameters(node.args)})"


def parameters(arguments: ast.arguments) -> str:
    """Parameters as text, without annotations."""
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    parts = [a.arg + (f"={MARK}" if i >= required else "") for i, a in enumerate(positional)]
    if arguments.posonlyargs:
        parts.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        parts.append(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        parts.append("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parts.append(argument.arg + (f"={MARK}" if default is not None else ""))
    if arguments.kwarg:
        parts.append(f"**{arguments.kwarg.arg}")
    return ", ".join(parts)


def constructor(sources: Sources, found: Found) -> str | None:
    """Parameters of a class, from ``__init__`` or from the fields of a dataclass; None: unknown."""
    text: str | None = None
    fields: dict[str, tuple[bool, str]] = {}  # name -> whether by name only, and its text
    for ancestor in reversed(sources.lineage(found)):
        assert isinstance(ancestor.node, ast.ClassDef)
        decorators = " ".join(map(ast.unparse, ancestor.node.decorator_list))
        if init := members(ancestor.node).get("__init__"):
            text = signature(init)
        elif "dataclass" in decorators:
            text = None
            for node in ancestor.node.body:
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                    value = ast.unparse(node.value) if node.value else ""
                    if "ClassVar" not in ast.unparse(node.annotation) and "init=False" not in value:
                        default = "default" in value or not value.startswith("field(")
                        shown = node.target.id + (f"={MARK}" if value and default else "")
                        by_name = "kw_only=True" in f"{decorators} {value}"
                        fields[node.target.id] = (by_name, shown)
    if text or not fields:
        return text
    positional = [shown for by_name, shown in fields.values() if not by_name]
    named = [shown for by_name, shown in fields.values() if by_name]
    return f"({', '.join(['self', *positional, *(['*'] if named else []), *named])})"


def _reader(path: Path) -> Callable[[str], str | None]:
    if path.is_file():
        wheel = zipfile.ZipFile(path)
        names = set(wheel.namelist())
        return lambda file: wheel.read(file).decode() if file in names else None
    inner = sorted(path.glob("lib/python3*/site-packages"))
    root = inner[0] if inner else path
    return lambda file: (root / file).read_text() if (root / file).is_file() else None


def _parse(text: str, name: str, is_package: bool) -> Module:
    tree = ast.parse(text)
    module = Module(tree, is_package)
    for node in _flat(tree.body):
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
            module.defined[node.name] = node
        elif isinstance(node, ast.Import):
            for alias in node.names:
                full = alias.name if alias.asname else alias.name.split(".")[0]
                module.imported[alias.asname or full] = (full, None)
        elif isinstance(node, ast.ImportFrom):
            origin = _absolute(node, name, is_package)
            for alias in node.names:
                if alias.name == "*":
                    module.stars.append(origin)
                else:
                    module.imported[alias.asname or alias.name] = (origin, alias.name)
        for target in _targets(node):
            module.defined.setdefault(target, node)
    return module


def _flat(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a body and of the ``if``, ``try`` and ``with`` in it."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            for part in ("body", "orelse", "finalbody"):
                yield from _flat(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _flat(handler.body)


def _targets(node: ast.stmt) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    flat = [t for target in targets for t in getattr(target, "elts", [target])]
    return [target.id for target in flat if isinstance(target, ast.Name)]


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, *([node.module] if node.module else [])])
