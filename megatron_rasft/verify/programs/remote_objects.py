"""Lets tests use what a program defines without sharing an interpreter with it.

The tester and the candidate are two processes with a socket between them. A plain value (number, text, list, numpy
array, ...) crosses as a copy; anything else stays where it is, and the other side holds a stand-in that asks for
each operation. So tests are written and run as if they had imported the program, while the program sees the
arguments of its calls and nothing else: not the tests, not the expected values, not the verdict.

The tester reads messages that a hostile program may have written. They are JSON, bounded in length; decoding builds
values of a fixed list of types, imports nothing new, and calls nothing that the message names.
"""

import builtins
import collections
import datetime
import decimal
import fractions
import json
import re
import socket
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

Scalar = int | float | str | bool | None
_SCALARS = frozenset({int, float, str, bool, type(None)})
_PLAIN_BASES: tuple[Any, ...] = (int, float, str, bytes, list, tuple, dict, set, frozenset)
_MUTABLE = (list, dict, set, bytearray, collections.deque)
_TIMES: dict[str, Any] = {
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
}
_NUMERIC_DTYPE = re.compile(r"[<>|=]?[biufc]\d{1,2}")
_LENGTH = struct.Struct("!Q")

# What a name in the program may stand for in the tests: the tests' own copy is used, never the program's
_SHARED_NAMES_OF = frozenset(
    "math cmath random re string typing collections itertools functools operator heapq bisect statistics datetime "
    "decimal fractions copy json _operator _heapq _bisect _collections _functools _random".split()
)
_SHARED_MODULES = _SHARED_NAMES_OF | {"collections.abc", "time", "io", "sys", "os", "numpy"}
_NOT_SHARED = frozenset(
    "eval exec compile open input __import__ exit quit breakpoint globals locals vars".split()
)

_FORWARDED = (
    "len getitem setitem delitem bool str repr hash iter next enter exit int float index complex abs neg pos invert "
    "round trunc floor ceil reversed format bytes"
).split()
_VISIBLE_DUNDERS = frozenset("__name__ __qualname__ __doc__ __dict__ __annotations__ __members__".split())
_BETWEEN_OBJECTS = (
    "lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod".split()
)


class CandidateEndedError(BaseException):
    """The program's process is gone, or sends what no honest one would."""


class CannotCrossError(BaseException):
    """The tests want something that stand-ins cannot do; says nothing about the program."""


class Channel:
    """Whole JSON messages over a stream socket."""

    def __init__(self, stream: socket.socket, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes

    def send(self, message: list[Any]) -> None:
        """Raises ValueError for a message over the limit, before any of it is sent."""
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > self._max_bytes:
            raise ValueError(f"value larger than {self._max_bytes} bytes")
        try:
            self._stream.sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            raise CandidateEndedError("the program ended itself") from None

    def receive(self) -> list[Any]:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > self._max_bytes:
            raise CandidateEndedError(f"the program returned more than {self._max_bytes} bytes")
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise CandidateEndedError("the program sent nonsense") from None
        if not isinstance(message, list) or not message:
            raise CandidateEndedError("the program sent nonsense")
        return message

    def _read(self, length: int) -> bytes:
        parts = []
        while length:
            try:
                part = self._stream.recv(min(length, 1 << 20))
            except OSError:
                part = b""
            if not part:
                raise CandidateEndedError("the program ended itself")
            parts.append(part)
            length -= len(part)
        return b"".join(parts)


class Codec:
    """Values <-> JSON. A scalar and a list stand for themselves, an object ``{"t": type, "v": value}`` for the rest."""

    def reference(self, value: Any) -> dict[str, Any]:
        """How a value that is not plain is named on the wire."""
        raise NotImplementedError

    def dereference(self, tag: str, value: Any) -> Any:
        """The value that ``reference`` named on the other side."""
        raise NotImplementedError

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in _SCALARS:
            return value
        if kind is list:
            return self._encode_items(value)
        encoder = _ENCODERS.get(kind)
        if encoder is not None:
            return encoder(self, value)
        module = kind.__module__
        if module == "numpy" and (encoded := self._encode_numpy(value)) is not None:
            return encoded
        return self.reference(value)

    def decode(self, value: Any) -> Any:
        if type(value) is list:
            kinds = set(map(type, value))
            # a copy in any case: what was received is compared with it later
            return list(value) if kinds <= _SCALARS else [self.decode(item) for item in value]
        if type(value) is not dict:
            return value
        tag, content = value["t"], value["v"]
        if tag == "rows":
            return list(map(tuple, content))
        decoder = _DECODERS.get(tag)
        return decoder(self, content) if decoder is not None else self.dereference(tag, content)

    def _encode_items(self, items: Any) -> Any:
        """A list; rows of scalars, as a table of tuples is, without a tag for each."""
        kinds = set(map(type, items))
        if kinds <= _SCALARS:
            return list(items)
        if kinds == {tuple} and len(items) > 1 and all(set(map(type, item)) <= _SCALARS for item in items):
            return {"t": "rows", "v": list(map(list, items))}
        return [self.encode(item) for item in items]

    def _decode_items(self, items: Any) -> Any:
        if type(items) is dict and items["t"] == "rows":
            return map(tuple, items["v"])
        return map(self.decode, items)

    def _encode_pairs(self, items: Any) -> list[Any]:
        return [[self.encode(key), self.encode(item)] for key, item in items.items()]

    def _encode_numpy(self, value: Any) -> dict[str, Any] | None:
        numpy = sys.modules["numpy"]
        if isinstance(value, numpy.ndarray | numpy.generic) and _NUMERIC_DTYPE.fullmatch(value.dtype.str):
            raw = value.tobytes().hex()
            return {
                "t": "array",
                "v": [value.dtype.str, list(value.shape), raw, isinstance(value, numpy.generic)],
            }
        return None


def _tagged(tag: str, encode: Callable[[Codec, Any], Any]) -> Callable[[Codec, Any], dict[str, Any]]:
    return lambda codec, value: {"t": tag, "v": encode(codec, value)}


_ENCODERS: dict[type, Callable[[Codec, Any], Any]] = {
    tuple: _tagged("tuple", Codec._encode_items),
    set: _tagged("set", Codec._encode_items),
    frozenset: _tagged("frozenset", Codec._encode_items),
    dict: _tagged("dict", Codec._encode_pairs),
    bytes: _tagged("bytes", lambda _, value: value.hex()),
    bytearray: _tagged("bytearray", lambda _, value: value.hex()),
    complex: _tagged("complex", lambda _, value: [value.real, value.imag]),
    range: _tagged("range", lambda _, value: [value.start, value.stop, value.step]),
    type(...): _tagged("ellipsis", lambda _, value: None),
    type({}.keys()): _tagged("keys", Codec._encode_items),
    decimal.Decimal: _tagged("decimal", lambda _, value: str(value)),
    fractions.Fraction: _tagged("fraction", lambda _, value: [value.numerator, value.denominator]),
    datetime.timedelta: _tagged(
        "timedelta", lambda _, value: [value.days, value.seconds, value.microseconds]
    ),
    datetime.datetime: _tagged("datetime", lambda _, value: value.isoformat()),
    datetime.date: _tagged("date", lambda _, value: value.isoformat()),
    datetime.time: _tagged("time", lambda _, value: value.isoformat()),
    collections.Counter: _tagged("counter", Codec._encode_pairs),
    collections.OrderedDict: _tagged("ordered", Codec._encode_pairs),
    collections.defaultdict: _tagged(
        "default", lambda codec, value: [codec.encode(value.default_factory), codec._encode_pairs(value)]
    ),
    collections.deque: _tagged("deque", lambda codec, value: [codec._encode_items(value), value.maxlen]),
}


def _decode_pairs(codec: Codec, pairs: Any) -> list[tuple[Any, Any]]:
    return [(codec.decode(key), codec.decode(value)) for key, value in pairs]


def _decode_array(_: Codec, content: Any) -> Any:
    dtype, shape, raw, is_scalar = content
    if not _NUMERIC_DTYPE.fullmatch(dtype):
        raise CandidateEndedError("the program sent nonsense")
    import numpy  # there already if the program could make one

    array = numpy.frombuffer(bytes.fromhex(raw), dtype=dtype).reshape(shape).copy()
    return array[()] if is_scalar else array


def _decode_record(codec: Codec, content: Any) -> Any:
    name, fields, items = content
    return collections.namedtuple(str(name), [str(field) for field in fields], rename=True)(  # type: ignore[misc]
        *codec._decode_items(items)
    )


_DECODERS: dict[str, Callable[[Codec, Any], Any]] = {
    "tuple": lambda codec, items: tuple(codec._decode_items(items)),
    "set": lambda codec, items: set(codec._decode_items(items)),
    "frozenset": lambda codec, items: frozenset(codec._decode_items(items)),
    "dict": lambda codec, pairs: dict(_decode_pairs(codec, pairs)),
    "bytes": lambda _, text: bytes.fromhex(text),
    "bytearray": lambda _, text: bytearray.fromhex(text),
    "complex": lambda _, parts: complex(*parts),
    "range": lambda _, parts: range(*parts),
    "ellipsis": lambda *_: ...,
    "keys": lambda codec, items: dict.fromkeys(codec._decode_items(items)).keys(),
    "decimal": lambda _, text: decimal.Decimal(text),
    "fraction": lambda _, parts: fractions.Fraction(*parts),
    "timedelta": lambda _, parts: datetime.timedelta(*parts),
    **{
        name: (lambda _, text, kind=kind: kind.fromisoformat(text))  # type: ignore[misc]
        for name, kind in _TIMES.items()
    },
    "counter": lambda codec, pairs: collections.Counter(dict(_decode_pairs(codec, pairs))),
    "ordered": lambda codec, pairs: collections.OrderedDict(_decode_pairs(codec, pairs)),
    "default": lambda codec, parts: collections.defaultdict(
        codec.decode(parts[0]), _decode_pairs(codec, parts[1])
    ),
    "deque": lambda codec, parts: collections.deque(codec._decode_items(parts[0]), parts[1]),
    "array": _decode_array,
    "record": _decode_record,
}


def shared_name(value: Any) -> list[str] | None:
    """``[module, name]`` under which both sides know a value; the name is empty for a module itself."""
    if isinstance(value, types.ModuleType):
        return [value.__name__, ""] if value.__name__ in _SHARED_MODULES else None
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if module is None and isinstance(value, types.BuiltinFunctionType):
        module = "builtins"
    if type(value).__module__ == "typing" and module == "typing":
        name = getattr(value, "_name", name)
    if not isinstance(module, str) or not isinstance(name, str):
        return None
    return [module, name] if look_up_shared(module, name) is value else None


def look_up_shared(module: str, name: str) -> Any:
    if module == "builtins":
        return None if name in _NOT_SHARED or name.startswith("_") else getattr(builtins, name, None)
    if module not in (_SHARED_NAMES_OF if name else _SHARED_MODULES):
        return None
    found = sys.modules.get(module)
    return getattr(found, name, None) if name else found


class TesterSide(Codec):
    """The tests' end: gives them stand-ins for what the program defines.

    Args:
        stream: to the candidate.
        max_bytes: longest message either way.
        own_module: ``__module__`` of classes that the tests define; their instances may cross by name.
    """

    def __init__(self, stream: socket.socket, max_bytes: int, own_module: str) -> None:
        self._channel = Channel(stream, max_bytes)
        self._own_module = own_module
        self._exported: dict[int, Any] = {}
        self._stand_ins: dict[int, Any] = {}
        self.fault: BaseException | None = None
        """The first CandidateEndedError or CannotCrossError: tests may catch it, the verdict must not miss it."""

        self.num_uses = 0
        """Operations on what the program defines; tests that pass without any say nothing about it."""

    def started(self) -> str:
        """Wait until the program has run; the error that ended it, or nothing."""
        self._channel.send(["start"])
        status, *rest = self._answer()
        return "" if status == "started" else str(rest[0] if rest else "")[:200]

    def get(self, name: str) -> Any:
        """What ``name`` is in the program.

        Raises:
            AttributeError: the program defines no such name.
        """
        return self._ask("get", name)

    def operate(self, operation: str, target: int, *args: Any, **keywords: Any) -> Any:
        """One operation on an object of the program; mutable arguments are brought up to date afterwards."""
        self.num_uses += 1
        return self._ask(operation, target, *args, **keywords)

    def reference(self, value: Any) -> dict[str, Any]:
        if isinstance(value, _STAND_INS):
            return {"t": "yours", "v": _number_of(value)}
        if isinstance(value, type) and issubclass(value, BaseException) and "_number" in vars(value):
            return {"t": "yours", "v": vars(value)["_number"]}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"t": "tuple", "v": self._encode_items(tuple(value))}
        shared = shared_name(value)
        if shared is not None:
            return {"t": "shared", "v": shared}
        is_own = type(value).__module__ == self._own_module and not isinstance(value, type)
        is_function = isinstance(value, types.FunctionType | types.MethodType | types.BuiltinFunctionType)
        is_iterator = isinstance(value, Iterator)
        if is_own or is_function or is_iterator or type(value).__module__ in ("functools", "operator"):
            self._exported[id(value)] = value
            return {"t": "mine", "v": id(value)}
        for base in _PLAIN_BASES:
            if isinstance(value, base):
                return self.encode(base(value))  # type: ignore[no-any-return]
        raise CannotCrossError(f"the tests hand a {type(value).__name__} to the program")

    def dereference(self, tag: str, value: Any) -> Any:
        if tag == "yours":
            return self._exported[value]
        if tag == "shared":
            module, name = value
            found = look_up_shared(str(module), str(name))
            if found is None:
                raise CandidateEndedError("the program sent nonsense")
            return found
        number, kind, *more = value
        if number not in self._stand_ins:
            self._stand_ins[number] = self._make_stand_in(number, kind, more)
        return self._stand_ins[number]

    def _make_stand_in(self, number: int, kind: str, more: list[Any]) -> Any:
        if kind == "coroutine":
            raise CannotCrossError("the program's coroutines cannot be awaited by the tests")
        if kind == "error class":
            name, bases = more
            parents = tuple(self._error_class(base) for base in bases) or (Exception,)
            try:
                return type(str(name), parents, {"_number": number})
            except TypeError:
                return type(str(name), parents[:1], {"_number": number})
        stand_in = {"class": RemoteClass, "callable": RemoteCallable}.get(kind, RemoteObject)
        return stand_in(self, number)

    def _error_class(self, encoded: Any) -> type[Exception]:
        """A builtin exception by its name, or the stand-in of one of the program's own."""
        if isinstance(encoded, str):
            found = getattr(builtins, encoded, None)
            if encoded == "SystemExit":
                return SystemExit  # type: ignore[return-value]
            # a MemoryError of the tests' own says nothing about the program
            is_error = isinstance(found, type) and issubclass(found, Exception) and found is not MemoryError
            return found if is_error else RuntimeError  # type: ignore[return-value]
        found = self.decode(encoded)
        return found if isinstance(found, type) and issubclass(found, Exception) else RuntimeError

    def _ask(self, operation: str, *args: Any, **keywords: Any) -> Any:
        try:
            value, error = self._answer_to(operation, args, keywords)
        except (CandidateEndedError, CannotCrossError) as fault:
            self.fault = self.fault or fault
            raise
        if error is not None:
            raise error
        return value

    def _answer_to(
        self, operation: str, args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, BaseException | None]:
        encoded = [self.encode(argument) for argument in args]
        pairs = [[key, self.encode(value)] for key, value in keywords.items()]
        self._channel.send([operation, encoded, pairs])
        status, *rest = self._answer()
        try:
            return self._settle(status, rest, args, keywords)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, ArithmeticError):
            raise CandidateEndedError("the program sent nonsense") from None

    def _settle(
        self, status: str, rest: list[Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, BaseException | None]:
        """(value, None) or (None, what the program raised), after what it printed and changed was passed on."""
        content, printed, changed = rest
        if printed:
            sys.stdout.write(str(printed))
        for place, encoded in changed:
            original = keywords[place] if isinstance(place, str) else args[place]
            _bring_up_to_date(original, self.decode(encoded))
        if status == "value":
            return self.decode(content), None
        if status != "raised":
            raise ValueError(status)
        kind, arguments, text, attributes = content
        return None, self._error(self._error_class(kind), self.decode(arguments), str(text), attributes)

    def _error(self, kind: type[Exception], args: Any, text: str, attributes: Any) -> Exception:
        try:
            error = kind(*args)
        except Exception:  # UnicodeDecodeError and its like want arguments of their own
            error = RuntimeError(text)
        if "_number" in vars(kind) and str(error) != text:
            error.args = (text,)
        for name, value in attributes:
            if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
                setattr(error, name, self.decode(value))
        return error

    def _answer(self) -> list[Any]:
        """The reply to what was asked; calls of the tests' own functions are served meanwhile."""
        while True:
            message = self._channel.receive()
            if message[0] != "call back":
                return message
            self._channel.send(self._serve(message[1:]))

    def _serve(self, request: list[Any]) -> list[Any]:
        """Only what the tests handed over, and of that no attribute with an underscore, can be reached."""
        try:
            operation, number, encoded, pairs = request
            args = [self.decode(item) for item in encoded]
            if operation == "input":
                return ["value", input(*args)]
            target = self._exported[number]
            if operation == "call" and callable(target):
                keywords = {str(name): self.decode(value) for name, value in pairs}
                return ["value", self.encode(target(*args, **keywords))]
            if operation == "next":
                return ["value", self.encode(next(target))]
            is_own = type(target).__module__ == self._own_module
            if not is_own or not isinstance(args[0], str) or args[0].startswith("_"):
                raise AttributeError(f"no access to {operation} of a {type(target).__name__} of the tests")
            if operation == "getattr":
                return ["value", self.encode(getattr(target, args[0]))]
            if operation == "setattr":
                setattr(target, args[0], args[1])
                return ["value", None]
            raise AttributeError(operation)
        except Exception as error:
            return ["error", type(error).__name__, str(error)[:1000]]


def _bring_up_to_date(original: Any, current: Any) -> None:
    """Give a mutable value what the program made of its copy, in place, as deep as the shapes agree."""
    if type(original) is not type(current) or not isinstance(original, (*_MUTABLE, tuple)):
        return
    if isinstance(original, (list, tuple)) and len(original) == len(current):
        for index, (old, new) in enumerate(zip(original, current, strict=True)):
            if isinstance(old, _MUTABLE) and type(old) is type(new):
                _bring_up_to_date(old, new)
            elif isinstance(original, list):
                original[index] = new
    elif isinstance(original, (list, bytearray)):
        original[:] = current
    elif isinstance(original, dict):
        kept = {key: original[key] for key in current if key in original}
        original.clear()
        for key, new in current.items():
            old = kept.get(key)
            if isinstance(old, _MUTABLE) and type(old) is type(new):
                _bring_up_to_date(old, new)
                new = old
            original[key] = new
    elif isinstance(original, (set, collections.deque)):
        original.clear()
        (original.update if isinstance(original, set) else original.extend)(current)


def _number_of(stand_in: Any) -> int:
    number: int = object.__getattribute__(stand_in, "_number")
    return number


def _operate(stand_in: Any, operation: str, *args: Any, **keywords: Any) -> Any:
    side: TesterSide = object.__getattribute__(stand_in, "_side")
    return side.operate(operation, _number_of(stand_in), *args, **keywords)


class RemoteObject:
    """Stands for an object that lives in the program's process.

    The program neither sees what its results are compared with nor decides about it: against a plain value an object
    is never equal and has no order and no arithmetic, and ``in`` looks through what it gives when it is iterated.
    """

    def __init__(self, side: TesterSide, number: int) -> None:
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        # Test frameworks look for marks of their own on everything they meet
        is_private = name.startswith("__") and name not in _VISIBLE_DUNDERS
        if is_private or name.startswith(("_pytest", "pytest")):
            raise AttributeError(name)
        return _operate(self, "getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        _operate(self, "setattr", name, value)

    def __delattr__(self, name: str) -> None:
        _operate(self, "delattr", name)

    def __contains__(self, item: Any) -> bool:
        if isinstance(item, RemoteObject):
            return bool(_operate(self, "special", "contains", item))
        return any(item is own or item == own for own in iter(self))  # type: ignore[call-overload]

    def __dir__(self) -> list[str]:
        return [str(name) for name in _operate(self, "dir")]


class RemoteCallable(RemoteObject):
    """A function, method or other callable of the program."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return _operate(self, "call", *args, **keywords)


class RemoteClass(RemoteCallable):
    """A class of the program."""

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, _STAND_INS) and bool(_operate(self, "isinstance", instance))

    def __subclasscheck__(self, subclass: Any) -> bool:
        return isinstance(subclass, RemoteClass) and bool(_operate(self, "issubclass", subclass))


_STAND_INS = (RemoteObject,)


def _forwarded(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return _operate(self, "special", name, *args)

    return method


def _between_objects(name: str, with_plain: Any = NotImplemented) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        return _operate(self, "special", name, other) if isinstance(other, RemoteObject) else with_plain

    return method


for _name in _FORWARDED:
    setattr(RemoteObject, f"__{_name}__", _forwarded(_name))
for _name in _BETWEEN_OBJECTS:
    setattr(RemoteObject, f"__{_name}__", _between_objects(_name))
RemoteObject.__eq__ = _between_objects("eq", False)  # type: ignore[method-assign]
RemoteObject.__ne__ = _between_objects("ne", True)  # type: ignore[method-assign]
