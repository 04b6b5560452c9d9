"""The candidate: the process that runs the program. It is untrusted and never holds tests or expected values.

The tester sends requests over a socket (see ``messages``): load the program, look up a name, call a function, read an
attribute. Objects that the tests pass to the program are replaced here by stand-ins, which send each operation back.
"""

import builtins
import contextlib
import enum
import inspect
import io
import operator
import socket
import sys
import types
from collections.abc import Callable
from typing import Any

from megatron_rasft.verify.programs.environment import remember_source, supply_star_imports
from megatron_rasft.verify.programs.messages import (
    CandidateEndedError,
    Channel,
    Codec,
    look_up_shared,
    shared_name,
)

# Special methods that the tester may call by name
_SPECIAL: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, f"__{name}__") for name in (
        "getitem setitem delitem contains eq ne lt le gt ge index abs neg pos invert add sub mul truediv floordiv mod "
        "pow matmul and or xor lshift rshift"
    ).split()},
    **{kind.__name__: kind for kind in (bool, str, int, float, complex, bytes)},
    **{f.__name__: f for f in (len, repr, hash, iter, next, round, reversed, format, divmod)},
    **{
        name: (lambda value, *args, name=name: getattr(type(value), f"__{name}__")(value, *args))
        for name in ("enter", "exit", "trunc", "floor", "ceil")
    },
}  # fmt: skip
_PLAIN_BASES: tuple[Any, ...] = (int, float, str, bytes, list, tuple, dict, set, frozenset)


def serve(stream: socket.socket, source: str, max_bytes: int) -> None:
    """Runs the program as a module ``solution`` and answers the tester's requests until the tester ends.

    Args:
        stream: the socket to the tester.
        source: the program.
        max_bytes: the longest message in either direction.
    """
    side = _CandidateSide(stream, source, max_bytes)
    # raised when the tester closes the socket: the tests are over
    with contextlib.suppress(CandidateEndedError):
        side.serve()


class _CandidateSide(Codec):
    """The candidate's end of the socket: executes the tester's requests on the program's objects."""

    def __init__(self, stream: socket.socket, source: str, max_bytes: int) -> None:
        self._channel = Channel(stream, max_bytes)
        self._source = source
        self._objects: dict[int, Any] = {}
        self._named_classes: set[type] = set()
        self._program = types.ModuleType("solution")
        self._printed = io.StringIO()

    def serve(self) -> None:
        # Printed text travels with each reply, so that tests can capture it in their own process
        sys.stdout = self._printed
        builtins.input = lambda prompt="": self.ask("input", 0, str(prompt))  # type: ignore[assignment]
        start, has_star_imports = self._channel.receive()
        assert start == "start"
        self._reply(self._start(has_star_imports))
        while True:
            self._do(self._channel.receive())

    def _start(self, has_star_imports: bool) -> list[Any]:
        sys.modules["solution"] = self._program
        remember_source("solution.py", self._source)
        try:
            if has_star_imports:
                supply_star_imports(self._program.__dict__)
            exec(compile(self._source, "solution.py", "exec", dont_inherit=True), self._program.__dict__)
        except BaseException as error:
            return ["failed", f"the program raised {_describe(error)}"]
        return ["started"]

    def ask(self, operation: str, number: int, *args: Any, **keywords: Any) -> Any:
        """Requests an operation on an object of the tests, and executes the tester's requests until the reply arrives."""
        pairs = [[name, self.encode(value)] for name, value in keywords.items()]
        self._channel.send(["call back", operation, number, [self.encode(arg) for arg in args], pairs])
        while True:
            message = self._channel.receive()
            if message[0] == "value":
                return self.decode(message[1])
            if message[0] == "error":
                kind = getattr(builtins, message[1], RuntimeError)
                raise kind(message[2])
            self._do(message)

    def _do(self, request: list[Any]) -> None:
        operation, encoded, pairs = request
        status, content, changed = "value", None, []
        try:
            args = [self.decode(item) for item in encoded]
            keywords = {key: self.decode(item) for key, item in pairs}
            try:
                content = self.encode(self._operate(operation, args, keywords))
            finally:
                changed = self._changes(encoded, args) + self._changes(dict(pairs), keywords)
        except BaseException as error:
            status, content = "raised", self._encode_error(error)
        self._reply([status, content, self._take_printed(), changed])

    def _reply(self, message: list[Any]) -> None:
        try:
            self._channel.send(message)
        # the message is too long, not JSON, or too deeply nested
        except (ValueError, TypeError, RecursionError) as error:
            reason = ["ValueError", {"t": "tuple", "v": [str(error)]}, str(error), []]
            self._channel.send(["raised", reason, "", []])

    def _operate(self, operation: str, args: list[Any], keywords: dict[str, Any]) -> Any:
        if operation == "get":
            return self._get(args[0])
        target, *rest = args
        target = self._objects[target]
        if operation == "call":
            return target(*rest, **keywords)
        if operation == "special":
            name, *operands = rest
            return _SPECIAL[name](target, *operands)
        if operation == "dir":
            return dir(target)
        if operation in ("getattr", "setattr", "delattr"):
            return getattr(builtins, operation)(target, *rest)
        if operation == "isinstance":
            return isinstance(rest[0], target)
        return issubclass(rest[0], target)

    def _get(self, name: str) -> Any:
        if name not in self._program.__dict__:
            raise AttributeError(f"the program defines no {name}")
        value = self._program.__dict__[name]
        if isinstance(value, type):
            self._named_classes.add(value)
        return value

    def _changes(self, encoded: Any, current: Any) -> list[list[Any]]:
        """Returns ``[position or keyword, new value]`` of every argument that the program changed."""
        places = encoded.items() if isinstance(encoded, dict) else enumerate(encoded)
        found = []
        for place, before in places:
            if isinstance(before, list | dict) and (after := self.encode(current[place])) != before:
                found.append([place, after])
        return found

    def _take_printed(self) -> str:
        printed = self._printed.getvalue()
        if printed:
            self._printed.seek(0)
            self._printed.truncate()
        return printed

    def _encode_error(self, error: BaseException) -> list[Any]:
        try:
            attributes = [
                [name, self.encode(value)] for name, value in vars(error).items() if not name.startswith("_")
            ]
            return [
                self._encode_error_class(type(error)),
                self.encode(error.args),
                str(error)[:1000],
                attributes,
            ]
        except BaseException as second:
            return ["RuntimeError", {"t": "tuple", "v": []}, type(second).__name__, []]

    def _encode_error_class(self, kind: type) -> Any:
        if kind.__module__ == "builtins" or not issubclass(kind, Exception):
            return kind.__name__
        return self.reference(kind)

    def reference(self, value: Any) -> dict[str, Any]:
        """Returns a JSON name for a value: side "receiver" for an object of the tests, "sender" for an object of this process."""
        if isinstance(value, _TestObject):
            return {"t": "receiver", "v": object.__getattribute__(value, "_number")}
        kind = type(value)
        if isinstance(value, tuple) and hasattr(value, "_fields") and kind not in self._named_classes:
            return {"t": "record", "v": [kind.__name__, list(value._fields), self._encode_items(value)]}
        if not isinstance(value, enum.Enum) and kind not in self._named_classes:
            for base in _PLAIN_BASES:
                if isinstance(value, base):
                    return self.encode(base(value))  # type: ignore[no-any-return]
        shared = shared_name(value)
        if shared is not None:
            return {"t": "shared", "v": shared}
        number = self._number(value)
        if isinstance(value, type) and issubclass(value, BaseException):
            bases = [
                self._encode_error_class(base) for base in value.__bases__ if issubclass(base, BaseException)
            ]
            return {"t": "sender", "v": [number, "error class", value.__name__, bases]}
        if isinstance(value, type):
            return {"t": "sender", "v": [number, "class"]}
        if inspect.iscoroutine(value):
            return {"t": "sender", "v": [number, "coroutine"]}
        return {"t": "sender", "v": [number, "callable" if callable(value) else "object"]}

    def _number(self, value: Any) -> int:
        # Never removed, because an id is unique only while its object exists
        self._objects[id(value)] = value
        return id(value)

    def dereference(self, tag: str, value: Any) -> Any:
        """Returns the program's own object for "receiver", a stand-in for "sender"."""
        if tag == "receiver":
            return self._objects[value]
        if tag == "shared":
            return look_up_shared(*value)
        return _TestObject(self, value)


class _TestObject:
    """The stand-in of an object that the tests passed to the program: a function, an iterator, or a plain object."""

    def __init__(self, side: _CandidateSide, number: int) -> None:
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_number", number)

    def _ask(self, operation: str, *args: Any, **keywords: Any) -> Any:
        side = object.__getattribute__(self, "_side")
        return side.ask(operation, object.__getattribute__(self, "_number"), *args, **keywords)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._ask("call", *args, **keywords)

    def __iter__(self) -> "_TestObject":
        return self

    def __next__(self) -> Any:
        return self._ask("next")

    def __getattr__(self, name: str) -> Any:
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _TestObject) and hash(self) == hash(other)

    def __hash__(self) -> int:
        return int(object.__getattribute__(self, "_number"))


def _describe(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "SystemExit while loading"
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {text}"[:200]
