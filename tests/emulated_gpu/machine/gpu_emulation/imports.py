"""Hooks on imports: work to do right before and after a module is executed, modules to provide and to hide."""

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
    """A module's own loader, with work before and after it."""

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
    """Finds a module as the other finders do, and wraps its loader."""

    def __init__(self, name: str, before: Callable[[], None], done: Callable[[], None]) -> None:
        self._name, self._before, self._done = name, before, done

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        # Many packages look for another one's spec without importing it: every look gives a wrapped one.
        found = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if found is not None:
            assert found.loader is not None
            found.loader = _Loader(found.loader, self._before, self._done)
        return found


class _Provided(importlib.abc.MetaPathFinder):
    """Finds one module in the source file of another."""

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
    """Call ``work`` once the module ``name`` has been executed, ``before`` right before that."""
    assert name not in sys.modules, f"{name} is imported already"
    sys.meta_path.insert(0, _After(name, before, work))


def provide(name: str, module: str) -> None:
    """Let ``import name`` execute the source file of ``module``."""
    sys.meta_path.insert(0, _Provided(name, module))


def stand_in(name: str) -> None:
    """Let ``import name`` give a module whose every attribute can be called and does nothing."""
    module: Any = MagicMock(name=name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    sys.modules[name] = module


def hide(name: str) -> None:
    """Let ``import name`` fail as if the package were not installed."""
    sys.modules[name] = None  # type: ignore[assignment]
