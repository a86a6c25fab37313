"""Scorers and formats of quantized pages, by the names that settings call them.

A class is found in one of three places: a file of its own in a folder of this package, an entry
point of another package, or code that registers it. Asking for the names imports none of the
classes, and no torch; a class is imported when it is asked for.
"""

from __future__ import annotations

from functools import cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, TypeVar

from vllm_kvzip.errors import suggest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = __name__.partition(".")[0]

C = TypeVar("C", bound=type[Any])


class Registry:
    """Classes of one kind; each has a class attribute ``name``.

    Args:
        kind: what one of them is called in messages.
        package: folder of this package, dotted; its own folders count too. File
            ``expected_attention.py`` in it registers the class named ``expected-attention`` when
            it is imported.
        group: of the entry points of other packages. The name of an entry point is that of its
            class.
        others: files of the folder that hold no such class.
    """

    def __init__(self, kind: str, package: str, group: str, others: tuple[str, ...] = ()) -> None:
        self._kind = kind
        self._package = package
        self._group = group
        self._others = others
        self._registered: dict[str, Any] = {}

    def register(self, found: C) -> C:
        """Make a class available under its name; usable as a class decorator.

        Raises:
            ValueError: if another class has that name.
        """
        name = found.name
        if self._registered.setdefault(name, found) is not found:
            raise ValueError(
                f"A {self._kind} named {name!r} is registered already; rename one of them."
            )
        return found

    def names(self) -> tuple[str, ...]:
        """Names of all classes, those of other packages included, in alphabetical order."""
        return tuple(sorted({*self._registered, *self._modules, *self._entry_points}))

    def find(self, name: str) -> Any:
        """The class of that name, imported.

        Raises:
            ValueError: if there is none (names the nearest one), several classes have that name,
                or an entry point is not named like its class.
        """
        self.check(name)
        if name in self._modules:
            import_module(self._modules[name])
        if name in self._entry_points:
            self.register(self._entry_points[name].load())
        if name not in self._registered:
            raise ValueError(
                f"What should be the {self._kind} {name} has another name; give the class and its "
                f"file, or its entry point in {self._group}, the same name."
            )
        return self._registered[name]

    def check(self, name: str) -> None:
        """Refuse a name that no class has.

        Raises:
            ValueError: names the nearest one.
        """
        names = self.names()
        if name not in names:
            raise ValueError(f"There is no {self._kind} {name}; {suggest(name, names)}")

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Name -> module of this package, those of inner folders included."""
        folder = Path(__file__).parent.joinpath(*self._package.split("."))
        return {
            stem.replace("_", "-"): module
            for stem, module in _modules_in(folder, f"{PACKAGE}.{self._package}")
            if stem not in self._others
        }

    @cached_property
    def _entry_points(self) -> dict[str, EntryPoint]:
        """Name -> what another package announces."""
        return {entry.name: entry for entry in entry_points(group=self._group)}


def _modules_in(folder: Path, package: str) -> Iterator[tuple[str, str]]:
    """Modules of a folder and of those in it, none of them imported: last name, and whole name."""
    for module in iter_modules([str(folder)]):
        if module.ispkg:
            yield from _modules_in(folder / module.name, f"{package}.{module.name}")
        else:
            yield module.name, f"{package}.{module.name}"


SCORERS = Registry("scorer", "scoring", "vllm_kvzip.scorers", others=("base", "observed"))
FORMATS = Registry("format", "quantization.formats", "vllm_kvzip.formats")
