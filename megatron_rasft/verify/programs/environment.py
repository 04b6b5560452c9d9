"""The surroundings of a program in the candidate: what it finds as its module, its source, and its standard streams.

A script must behave as under ``python solution.py < input``, except for what the sandbox forbids.
"""

import atexit
import builtins
import contextlib
import gc
import io
import linecache
import os
import sys
import threading
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

# LiveCodeBench's runner executes these imports before every program, and the class headers that it shows need them. It also
# raises the recursion limit. Its import of all builtins is left out: it has no effect, except on programs that replace one
_STAR_IMPORTED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json "
    "typing"
).split()
_IMPORTED = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys json"
).split()
_RECURSION_LIMIT = 50_000
_STREAMS = {
    path: fd
    for fd, name in enumerate(("stdin", "stdout", "stderr"))
    for path in (f"/dev/{name}", f"/dev/fd/{fd}", f"/proc/self/fd/{fd}")
}


def supply_star_imports(names: dict[str, Any]) -> None:
    """Adds the names to a module that LiveCodeBench's runner supplies, such as ``List``, ``deque`` and ``inf``."""
    names.update(star_imports())
    names.update({name: getattr(sys, name) for name in ("argv", "stdin", "stdout", "stderr")})
    sys.setrecursionlimit(_RECURSION_LIMIT)


@lru_cache(maxsize=1)
def star_imports() -> dict[str, Any]:
    """Returns name -> value for the names that LiveCodeBench's runner supplies. The first call takes milliseconds."""
    lines = [*(f"from {name} import *" for name in _STAR_IMPORTED), f"import {', '.join(_IMPORTED)}"]
    supplied: dict[str, Any] = {}
    exec("\n".join(lines), supplied)
    del supplied["__builtins__"]
    return {name: value for name, value in supplied.items() if not hasattr(builtins, name)}


def remember_source(name: str, source: str) -> None:
    """Makes the source of a program available to ``inspect`` and ``traceback``, although no file holds it."""
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)


def run_script(source: str) -> int:
    """Runs a program as a script, with the standard streams 0 and 1. Returns its exit status, 0 .. 255.

    As when Python ends, its threads are joined and its exit handlers run, whatever the status.
    """
    main = types.ModuleType("__main__")
    path = os.path.join(os.getcwd(), "solution.py")
    main.__dict__.update(__builtins__=builtins, __file__=path)
    sys.modules["__main__"] = main
    sys.argv = ["solution.py"]
    sys.path.insert(0, os.path.dirname(path))
    remember_source(path, source)
    _open_streams()
    _write_source(path, source)
    supply_star_imports(main.__dict__)
    status = _status_of(lambda: exec(compile(source, path, "exec", dont_inherit=True), main.__dict__))
    return _end(main, status, has_finalizers="__del__" in source or "weakref" in source)


def _open_streams() -> None:
    """Opens the standard streams as Python does for files, and lets programs open them by their names in /dev."""
    options: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "closefd": False}
    for name, mode, fd in (("stdin", "r", 0), ("stdout", "w", 1)):
        stream: Any = open(fd, mode, **options)  # noqa: SIM115 (it stays open)
        stream.buffer.raw.name = f"<{name}>"
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    builtins.open = io.open = _opening_streams(open)
    os.open = _opening_streams(os.open)


def _opening_streams(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns an ``open`` that duplicates a standard stream for a path such as /dev/stdin, which does not exist here."""

    def opening(file: Any, *args: Any, **keywords: Any) -> Any:
        fd = _STREAMS.get(os.fspath(file)) if isinstance(file, str | os.PathLike) else None  # type: ignore[call-overload]
        if fd is None:
            return function(file, *args, **keywords)
        copy = os.dup(fd)
        return copy if function.__module__ in ("posix", "nt") else function(copy, *args, **keywords)

    return opening


def _write_source(path: str, source: str) -> None:
    if "__file__" in source or "argv" in source:
        # No file can be written at the level "limits"
        with (
            contextlib.suppress(OSError),
            open(path, "w", encoding="utf-8", errors="surrogateescape") as file,
        ):
            file.write(source)


def _status_of(action: Callable[[], object]) -> int:
    """Calls ``action``. Returns the status with which Python would end after it."""
    try:
        action()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException as error:
        with contextlib.suppress(BaseException):
            sys.excepthook(type(error), error, error.__traceback__)
        return 1
    return 0


def _end(main: types.ModuleType, status: int, has_finalizers: bool) -> int:
    """Does what Python does when a script has ended: joins threads, runs exit handlers, flushes."""
    for action in (threading._shutdown, atexit._run_exitfuncs):  # type: ignore[attr-defined]
        with contextlib.suppress(BaseException):
            action()
    status = status or _flush()
    # This closes files that the program has left open, which writes out their buffers
    main.__dict__.clear()
    if has_finalizers:
        gc.collect()
    return (status or _flush()) & 0xFF


def _flush() -> int:
    """Writes out the buffers of standard output. Returns 1 if that fails, else 0."""
    # A program may have replaced sys.stdout, or detached the stream below it
    with contextlib.suppress(BaseException):
        sys.__stdout__.flush()  # type: ignore[union-attr]
    try:
        if sys.stdout is not None and not sys.stdout.closed:
            sys.stdout.flush()
    except BaseException:
        return 1
    return 0
