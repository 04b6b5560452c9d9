"""Import hooks: functions to call before and after a module is executed, and modules to provide or hide."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock


def _nothing() -> None: ...


class _Loader(importlib.abc.Loader):
    """Wraps the loader of a module, with functions to call before and after it."""

    def __init__(
        self, loader: importlib.abc.Loader, before: Callable[[], None], done: Callable[[], None]
    ) -> None:
        self._loader, self._before, self._done = loader, before, done

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._before()
        self._loader.exec_module(module)
        self._done()

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


class _After(importlib.abc.MetaPathFinder):
    """Finds a module by the other finders, and wraps its loader."""

    def __init__(self, name: str, before: Callable[[], None], done: Callable[[], None]) -> None:
        self._name, self._before, self._done = name, before, done

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        # Many packages look up the spec of another package without importing it, so every look-up returns a wrapped spec.
        found = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if found is not None:
            assert found.loader is not None
            found.loader = _Loader(found.loader, self._before, self._done)
        return found


class _Provided(importlib.abc.MetaPathFinder):
    """Finds a module in the source file of another module."""

    def __init__(self, name: str, module: str) -> None:
        self._name, self._module = name, module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        real = importlib.util.find_spec(self._module)
        assert real is not None and real.origin is not None
        return importlib.util.spec_from_file_location(self._name, real.origin)


def after(name: str, work: Callable[[], None], *, before: Callable[[], None] = _nothing) -> None:
    """Calls ``before`` right before the module ``name`` is executed, and ``work`` right after."""
    assert name not in sys.modules, f"{name} is imported already"
    sys.meta_path.insert(0, _After(name, before, work))


def provide(name: str, module: str) -> None:
    """Makes ``import name`` execute the source file of ``module``."""
    sys.meta_path.insert(0, _Provided(name, module))


def stand_in(name: str) -> None:
    """Makes ``import name`` return a module whose attributes are all functions that do nothing."""
    module: Any = MagicMock(name=name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module


def hide(name: str) -> None:
    """Makes ``import name`` fail as if the package were not installed."""
    sys.modules[name] = None  # type: ignore[assignment]
