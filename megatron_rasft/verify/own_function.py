"""The user's function of --verify-function: finds its code, loads it in a worker, calls it, and reads what it returns.

The trainer reads the text of the file and never runs it.
"""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.machinery import ModuleSpec
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

from megatron_rasft.config.verify import FUNCTION_GROUP, check_function, file_and_name
from megatron_rasft.errors import RasftError
from megatron_rasft.types import Judgement, ProblemRow, Verdict
from megatron_rasft.verify.imported_sources import imported_sources

VerifyFunction = Callable[[ProblemRow, str], Judgement | tuple[Judgement, str]]
"""``(row, response) -> judgement``, or a tuple of the judgement and a reason."""

FAILED = "--verify-function "
"""Start of ``verdict_reason`` of a response for which the function raised, or returned something that is not a judgement."""

_MODULE_PREFIX = "verify_function_"
_VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
_REWARDS: dict[Verdict, float] = {"correct": 1.0, "wrong": 0.0}
_WANTED = (
    f"a bool, a number in [0, 1], or one of {', '.join(_VERDICTS)}; or a tuple of one of these and a reason"
)


class FunctionError(RasftError):
    """The function cannot be loaded, or did not return a judgement. The message does not name the flag."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnFunction:
    """A function of the user, with its code as it was when the run started. Later changes of the file have no effect."""

    reference: str
    """The value of --verify-function."""
    name: str
    """Name of the function in its module."""
    module: str
    """The module of an entry point; "" for a file, whose ``code`` is run."""
    file: str
    """The file of the code; "" if an entry point's module is not a file of Python."""
    code: str
    """The text of the file; for a module without one, the version of its package."""
    digest: str
    """Identifies the code of the file, and of the modules that it imports from its own folder or package."""


def find_function(reference: str) -> OwnFunction:
    """Reads the code of a --verify-function, without running it.

    Raises:
        ValueError: the file or the entry point does not exist, or cannot be read.
    """
    check_function(reference)
    found = file_and_name(reference)
    if found is not None:
        name, module, file = found[1], "", str(found[0].resolve())
    else:
        entry = _entry_point(reference)
        name, module, file = entry.attr, entry.module, _file_of(entry.module)
    code = _read(reference, file) if file else f"version {entry.dist.version if entry.dist else ''}"
    digest = _digest(code, imported_sources(Path(file), module) if file else {})
    return OwnFunction(reference=reference, name=name, module=module, file=file, code=code, digest=digest)


def _digest(code: str, imported: Mapping[str, bytes]) -> str:
    digest = hashlib.sha256(code.encode("utf-8", "surrogateescape"))
    for path, content in imported.items():
        digest.update(f"\0{path}\0".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()[:16]


def _read(reference: str, file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--verify-function {reference}: {file} cannot be read: {error}.") from error


def _entry_point(name: str) -> metadata.EntryPoint:
    found = {entry.value: entry for entry in metadata.entry_points(group=FUNCTION_GROUP, name=name)}
    if len(found) > 1:
        raise ValueError(
            f"--verify-function {name}: several installed packages have this entry point ({', '.join(found)}). Give FILE.py:NAME."
        )
    return next(iter(found.values()))


def _file_of(module: str) -> str:
    """Returns the source file of a module, which is not imported; "" if there is none."""
    path, spec, parts = None, None, module.split(".")
    for end in range(1, len(parts) + 1):
        spec = next(_specs(".".join(parts[:end]), path), None)
        path = None if spec is None else spec.submodule_search_locations
    origin = None if spec is None else spec.origin
    return origin if origin is not None and origin.endswith(".py") else ""


def _specs(module: str, path: Any) -> Iterator[ModuleSpec]:
    # importlib.util.find_spec would import the packages around the module
    for finder in sys.meta_path:
        spec = finder.find_spec(module, path)
        if spec is not None:
            yield spec


# ---- in a worker

_loaded: dict[OwnFunction, VerifyFunction] = {}


def preload(function: OwnFunction | None) -> None:
    """Loads the function in a new worker, so that the time for its imports does not count as grading. Errors are raised later."""
    if function is not None:
        with suppress(FunctionError):
            load(function)


def load(function: OwnFunction) -> VerifyFunction:
    """Returns the function, after it was checked.

    Raises:
        FunctionError: its code raises, or it is missing, not callable, asynchronous, or does not take two arguments.
    """
    if function not in _loaded:
        _loaded[function] = _checked(function, _module_of(function))
    return _loaded[function]


def _module_of(function: OwnFunction) -> ModuleType:
    try:
        return import_module(function.module) if function.module else _run(function)
    except BaseException as error:  # the file may call sys.exit()
        raise FunctionError(f"its code raised {describe(error, function.file)}") from error


def _run(function: OwnFunction) -> ModuleType:
    file = Path(function.file)
    # At the end: the file may import its neighbours, but they do not hide installed packages
    sys.path.append(str(file.parent))
    module = ModuleType(_MODULE_PREFIX + file.stem)
    module.__file__ = function.file
    sys.modules[module.__name__] = module  # dataclasses look up their module there
    exec(compile(function.code, function.file, "exec"), module.__dict__)
    return module


def _checked(function: OwnFunction, module: ModuleType) -> VerifyFunction:
    found: Any = module
    for part in function.name.split("."):
        found = getattr(found, part, None)
    if found is None:
        defined = [n for n, v in vars(module).items() if inspect.isfunction(v) and not n.startswith("_")]
        raise FunctionError(
            f"there is no {function.name!r} in it. It defines: {', '.join(defined) or 'no function'}"
        )
    if not callable(found):
        raise FunctionError(f"{function.name} is not callable, it is of type {type(found).__name__}")
    if inspect.iscoroutinefunction(found):
        raise FunctionError(f"{function.name} is asynchronous. Define it with def")
    with suppress(ValueError):  # functions in C may have no signature
        signature = inspect.signature(found)
        try:
            signature.bind({}, "")
        except TypeError:
            raise FunctionError(
                f"{function.name}{signature}{_place(found)} must take two arguments, (row, response)"
            ) from None
    return found  # type: ignore[no-any-return]


def grade_by_function(
    response: str, row: ProblemRow, function: OwnFunction, correct_reward: float
) -> tuple[Verdict, str, float | None]:
    """Calls the function. Returns verdict, reason and reward; ``unverifiable`` and no reward if it raises."""
    try:
        check = load(function)
        return judged(check(row, response), correct_reward, _place(check))
    except FunctionError as error:
        return "unverifiable", f"{FAILED}{error}", None
    except (Exception, SystemExit) as error:
        return "unverifiable", f"{FAILED}raised {describe(error, function.file)}", None


def judged(returned: Any, correct_reward: float, place: str = "") -> tuple[Verdict, str, float | None]:
    """Reads what the function returned.

    Args:
        returned: a judgement, or a tuple of a judgement and a reason.
        correct_reward: smallest reward of the verdict ``correct``.
        place: where the function is defined, for the message.

    Raises:
        FunctionError: it is something else.
    """
    judgement, reason = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, "")
    if isinstance(judgement, str) and judgement in _VERDICTS:
        return judgement, str(reason), _REWARDS.get(judgement)
    reward = _number(judgement)
    if reward is None or not 0 <= reward <= 1:  # NaN is not in the range
        raise FunctionError(f"returned {repr(returned)[:60]}{place}. It must return {_WANTED}")
    verdict: Verdict = "correct" if reward >= correct_reward else "wrong"
    return verdict, str(reason) or f"reward {reward:g}", reward


def _number(value: Any) -> float | None:
    if hasattr(value, "item"):  # tensors and numpy's scalars with one element
        with suppress(ValueError, RuntimeError):
            value = value.item()
    return float(value) if isinstance(value, Real) else None


def _place(function: VerifyFunction) -> str:
    """Returns where a function is defined, as `` (grade.py:12)``; "" if Python does not know it."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    return f" ({Path(code.co_filename).name}:{code.co_firstlineno})" if code else ""


def describe(error: BaseException, file: str) -> str:
    """Returns type and message of an error, and the last line of ``file`` that led to it: ``KeyError: 'x' (grade.py:12)``."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"SyntaxError: {error.msg} ({Path(file).name}:{error.lineno})"
    text = f"{type(error).__name__}: {error}".removesuffix(": ")
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{text[:120]} ({Path(file).name}:{lines[-1]})" if lines else text[:150]
