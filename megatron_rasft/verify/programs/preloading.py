"""Loads modules in the launcher, so that the processes that it forks for a check need not load them."""

import contextlib
import importlib
import os
import pkgutil
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import TextIO

from megatron_rasft.verify.programs import environment

_COMMON = (
    "math cmath random re string json datetime decimal fractions statistics copy operator itertools functools "
    "collections collections.abc heapq bisect typing dataclasses enum abc io time timeit hashlib base64 textwrap "
    "contextlib array numbers zlib calendar threading atexit"
).split()
# Modules that act when they are imported, for example open a window or print, and the tests of Python itself
_NOT_LOADED = frozenset(
    "antigravity ensurepip idlelib lib2to3 this tkinter turtle turtledemo test venv".split()
)
_LOADED_LATER = {
    # Submodules that numpy loads on first use
    "numpy": "numpy.random numpy.linalg numpy.fft numpy.polynomial numpy.ma numpy.testing numpy.char numpy.rec numpy.strings "
    "numpy.ctypeslib numpy.emath numpy.exceptions numpy.dtypes numpy.lib.stride_tricks numpy.lib.scimath numpy.typing "
    "numpy.lib.recfunctions numpy.lib.format numpy.lib.npyio numpy.matlib numpy._core._methods numpy._core._dtype "
    "numpy._core._internal",
}


# zoneinfo forgets a time zone that nobody refers to
_kept: list[object] = []


def load_modules(packages: Sequence[str], *, is_complete: bool) -> None:
    """Imports the common modules of the standard library, and packages.

    Args:
        packages: names of packages to import in addition.
        is_complete: whether to import the complete standard library and the submodules of the packages, because no file
            can be opened later.
    """
    names: Iterable[str] = (*_COMMON, *packages)
    if is_complete:
        later = [name for package in packages for name in _LOADED_LATER.get(package, "").split()]
        names = chain(names, _standard_library(), later)
    with open(os.devnull, "w") as null, _silenced(null):
        for name in names:
            _import(name)
        if "pytest" in packages:
            # The first run of pytest imports its own plugins
            with contextlib.suppress(ImportError, SystemExit):
                importlib.import_module("pytest").main(["--version"])
    environment.star_imports()
    # Python reads these on first use, when files may no longer be readable
    with contextlib.suppress(Exception):
        "".encode("idna")
        __import__("locale").getpreferredencoding(False)
        _kept.append(__import__("zoneinfo").ZoneInfo("UTC") if is_complete else None)


@contextlib.contextmanager
def _silenced(null: TextIO) -> Iterator[None]:
    with contextlib.redirect_stdout(null), contextlib.redirect_stderr(null), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _import(name: str) -> None:
    # Modules for other systems raise ImportError, some others need a file or a terminal
    with contextlib.suppress(Exception, SystemExit):
        importlib.import_module(name)


def _standard_library() -> Iterator[str]:
    """Yields the names of all modules of the standard library that a program may use, with their submodules.

    Import each name before you ask for the next one, because only a loaded package can be searched for submodules. Python
    imports some of them on first use: ``datetime.strptime`` needs ``_strptime``, an encoding its codec.
    """
    for name in sorted(sys.stdlib_module_names - _NOT_LOADED):
        yield name
        module = sys.modules.get(name)
        for found in pkgutil.walk_packages(
            getattr(module, "__path__", ()), f"{name}.", onerror=lambda _: None
        ):
            if not {"__main__", "test", "tests", *_NOT_LOADED} & set(found.name.split(".")):
                yield found.name
