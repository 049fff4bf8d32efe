"""Imports that wait until somebody asks: what PEP 810 gives to Python 3.15, for the modules of others.

While a large package is imported, a `Deferral` stands at the front of the import path. A module that is put off is
in `sys.modules` as a shell, and a name taken from it is a stand-in: as an annotation it is enough as it is, and
called, inherited from, compared with or asked for an attribute it imports the module and is the real thing.
`settle` imports what is still put off and puts the real things where the stand-ins were taken to.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def settle() -> None:
    """Import all that was put off, except where there are answers instead. A thread may do it."""
    for finder in list(sys.meta_path):
        if isinstance(finder, Deferral) and not finder.answers:
            finder.settle()


class Deferral(importlib.abc.MetaPathFinder):
    """Puts off `modules`, and those with `answers`: names that can be had without the module.

    Any other name taken from a module with answers imports it, and so does a part of it that is not among `parts`.
    `after` is called with a module that has just been imported, to mend it.
    """

    def __init__(
        self,
        modules: Collection[str],
        answers: Mapping[str, Mapping[str, Any]] | None = None,
        parts: Collection[str] = (),
        after: Mapping[str, Callable[[ModuleType], None]] | None = None,
    ) -> None:
        self.answers = answers or {}
        self.open = False
        self.taken: list[tuple[dict[str, Any], StandIn]] = []
        self.stand_ins: dict[tuple[str, str], StandIn] = {}
        self._waiting = {*modules, *self.answers}
        self._parts = parts
        self._after = after or {}
        self._lock = threading.RLock()

    def begin(self) -> None:
        """Put modules off from now on."""
        sys.meta_path.insert(0, self)
        self.open = True

    def settle(self) -> None:
        """Import what was put off, and put no more off. Any thread may do it."""
        self.open = False
        for name in sorted(self._waiting):
            if name in sys.modules:
                self.real(name)
        for scope, stand_in in self.taken:
            for name in [name for name, value in list(scope.items()) if value is stand_in]:
                scope[name] = stand_in._real()  # noqa: SLF001 -- its other names are the real thing's
        self.taken.clear()

    def real(self, name: str) -> ModuleType:
        """Import a module that may be put off, or be part of a package that is."""
        with self._lock:
            for other in list(self._waiting):
                if _within(name, {other}):
                    self._drop(other)
        module = importlib.import_module(name)
        for part, loaded in list(sys.modules.items()):
            package, _, tail = part.rpartition(".")
            if package == name:
                module.__dict__.setdefault(tail, loaded)
        return module

    def _drop(self, name: str) -> None:
        for other in [other for other in self._waiting if _within(other, {name})]:
            self._waiting.discard(other)
            if isinstance(sys.modules.get(other), _Shell):
                del sys.modules[other]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        del target
        if name in self._waiting and self.open:
            spec = PathFinder.find_spec(name, path)
            if spec is not None:
                spec.loader = _ShellLoader(self)
            return spec
        self._waiting.discard(name)
        if self._alone(name):
            self.real(name.rpartition(".")[0])
            if name in sys.modules:  # its package has imported it: that one, not another
                module = sys.modules[name]
                loaded = ModuleSpec(name, _Loaded(module))
                module.__spec__ = loaded  # which the import system would execute once more; the loader puts it back
                return loaded
        if name in self._after:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _Mended(spec.loader, self._after[name])
            return spec
        return None

    def _alone(self, name: str) -> bool:
        """Return whether this would be a part without its package that needs the package."""
        if not self.open:
            return _within(name, self._waiting)
        return (
            bool(self.answers) and _within(name, self._waiting & self.answers.keys()) and not _within(name, self._parts)
        )


def _within(name: str, packages: Container[str]) -> bool:
    """Return whether `name` is one of `packages`, or a part of one. Asked at every import, so by prefix."""
    prefix = name
    while prefix and prefix not in packages:
        prefix = prefix.rpartition(".")[0]
    return bool(prefix)


class _ShellLoader(importlib.abc.Loader):
    def __init__(self, deferral: Deferral) -> None:
        self._deferral = deferral

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Shell(spec.name, self._deferral)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing yet."""


class _Loaded(importlib.abc.Loader):
    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        del spec
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Mended(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, after: Callable[[ModuleType], None]) -> None:
        self._loader = loader
        self._after = after

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._after(module)


class _Shell(ModuleType):
    """A module that is put off."""

    def __init__(self, name: str, deferral: Deferral) -> None:
        super().__init__(name)
        self.__dict__["_deferral"] = deferral

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        deferral, module = self.__dict__["_deferral"], self.__name__
        part = f"{module}.{name}"
        if (real := sys.modules.get(module, self)) is not self:  # there by now, or half imported
            return getattr(real, name)
        if name in deferral.answers.get(module, ()):
            return deferral.answers[module][name]
        if part in sys.modules:
            return sys.modules[part]
        scope = sys._getframe(1).f_globals  # noqa: SLF001 -- whose import it is
        if PathFinder.find_spec(part, self.__dict__.get("__path__", [])):
            if scope["__name__"] == "importlib._bootstrap":
                raise AttributeError(name)  # of `from module import part`: it goes on to import the part
            try:
                return importlib.import_module(part)
            except ModuleNotFoundError as error:
                raise AttributeError(name) from error
        if not deferral.open or module in deferral.answers:
            return getattr(deferral.real(module), name)
        stand_in = deferral.stand_ins.setdefault((module, name), StandIn(deferral, module, name))
        deferral.taken.append((scope, stand_in))
        return stand_in


class StandIn:
    """A name of a module that is put off. Special methods are looked up in the class, so it has them itself."""

    def __init__(self, deferral: Deferral, module: str, name: str) -> None:
        self._deferral = deferral
        self._module = module
        self._name = name

    def _real(self) -> Any:
        return getattr(self._deferral.real(self._module), self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._real()(*args, **kwargs)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[Any, ...]:
        del bases
        return (self._real(),)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self._real())

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self._real())

    def __getitem__(self, item: Any) -> Any:
        return self._real()[item]

    def __contains__(self, item: Any) -> bool:
        return item in self._real()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._real())

    def __or__(self, other: object) -> Any:
        """`Name | None`: an annotation."""
        return Any

    __ror__ = __or__
