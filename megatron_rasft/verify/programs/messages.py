"""The messages between the tester and the candidate: JSON over a socket, and how Python values are written in it.

A plain value (number, text, list, numpy array, ...) crosses as a copy. Any other object stays in its process. The
message names it by a number, and the receiver creates a stand-in that sends each operation back.

The tester reads messages that a hostile program may have written. They are JSON and bounded in length. Decoding builds
values of a fixed list of types only: it imports no module and calls nothing that the message names.
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
from collections.abc import Callable
from typing import Any

_SCALARS = frozenset({int, float, str, bool, type(None)})
PLAIN_BASES: tuple[Any, ...] = (int, float, str, bytes, list, tuple, dict, set, frozenset)
MUTABLE = (list, dict, set, bytearray, collections.deque)
_TIMES: dict[str, Any] = {
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
}
_NUMERIC_DTYPE = re.compile(r"[<>|=]?[biufc]\d{1,2}")
_LENGTH = struct.Struct("!Q")

# Functions and classes of these modules cross by name. The receiver uses its own copy, so that a program that patches
# a module changes nothing in the tests' process.
_SHARED_NAMES_OF = frozenset(
    "math cmath random re string typing collections itertools functools operator heapq bisect statistics datetime "
    "decimal fractions copy json _operator _heapq _bisect _collections _functools _random".split()
)
_SHARED_MODULES = _SHARED_NAMES_OF | {"collections.abc", "time", "io", "sys", "os", "numpy"}
# Builtins that run code, open files or look into frames: a message must not make the tester call them
_NOT_SHARED = frozenset(
    "eval exec compile open input __import__ exit quit breakpoint globals locals vars".split()
)


class CandidateEndedError(BaseException):
    """The program's process ended, or sent an invalid message.

    A BaseException, so that ``except Exception`` in the tests does not swallow it.
    """


class CannotCrossError(BaseException):
    """The tests need an operation that stand-ins do not support. The program is not at fault."""


class Channel:
    """Sends and receives JSON messages over a stream socket, each preceded by its length.

    Args:
        stream: the socket to the other process.
        max_bytes: the longest message in either direction.
    """

    def __init__(self, stream: socket.socket, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes

    def send(self, message: list[Any]) -> None:
        """Sends one message.

        Raises:
            ValueError: the message is longer than ``max_bytes``; nothing was sent.
            CandidateEndedError: the other process has closed its end.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > self._max_bytes:
            raise ValueError(f"value larger than {self._max_bytes} bytes")
        try:
            self._stream.sendall(_LENGTH.pack(len(data)) + data)
        except OSError:
            raise CandidateEndedError("the program ended itself") from None

    def receive(self) -> list[Any]:
        """Waits for one message: a list that is not empty.

        Raises:
            CandidateEndedError: the other process has closed its end, or sent an invalid or too long message.
        """
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > self._max_bytes:
            raise CandidateEndedError(f"the program returned more than {self._max_bytes} bytes")
        try:
            message = json.loads(self._read(length))
        except (ValueError, RecursionError):
            raise CandidateEndedError("the program sent an invalid message") from None
        except MemoryError:
            raise CandidateEndedError("the program returned a value that needs too much memory") from None
        if not isinstance(message, list) or not message:
            raise CandidateEndedError("the program sent an invalid message")
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
    """Converts values to JSON and back.

    Scalars and lists are written as they are, every other value as an object ``{"t": type, "v": content}``. The two
    sides subclass this to define how they name objects that do not cross.
    """

    def reference(self, value: Any) -> dict[str, Any]:
        """Returns the JSON object that refers to a value which is not plain."""
        raise NotImplementedError

    def dereference(self, tag: str, value: Any) -> Any:
        """Returns the value to which the other side's ``reference`` refers."""
        raise NotImplementedError

    def received_array(self, array: Any) -> Any:
        """Returns what this side uses in place of a numpy array that the other side sent."""
        return array

    def encode(self, value: Any) -> Any:
        """Returns ``value`` as JSON data."""
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
        """Returns the value that the other side encoded."""
        if type(value) is list:
            kinds = set(map(type, value))
            # A copy even of plain lists: the candidate later compares the received list with the changed argument
            return list(value) if kinds <= _SCALARS else [self.decode(item) for item in value]
        if type(value) is not dict:
            return value
        tag, content = value["t"], value["v"]
        if tag == "rows":
            return list(map(tuple, content))
        decoder = _DECODERS.get(tag)
        return decoder(self, content) if decoder is not None else self.dereference(tag, content)

    def _encode_items(self, items: Any) -> Any:
        """Encodes a sequence. A table of tuples of scalars gets one tag for all its rows, to keep messages short."""
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


def _decode_array(codec: Codec, content: Any) -> Any:
    dtype, shape, raw, is_scalar = content
    if not _NUMERIC_DTYPE.fullmatch(dtype):
        raise CandidateEndedError("the program sent an invalid message")
    import numpy  # loaded before the confinement if the program or the tests name it

    array = numpy.frombuffer(bytes.fromhex(raw), dtype=dtype).reshape(shape).copy()
    return array[()] if is_scalar else codec.received_array(array)


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
    """Returns ``[module, name]`` of a value that both processes have, or None. For a module, the name is empty."""
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
    """Returns the value that ``shared_name`` named, or None if it is not on the list or its module is not loaded."""
    if module == "builtins":
        return None if name in _NOT_SHARED or name.startswith("_") else getattr(builtins, name, None)
    if module not in (_SHARED_NAMES_OF if name else _SHARED_MODULES):
        return None
    found = sys.modules.get(module)
    value = getattr(found, name, None) if name else found
    # A module on the list can contain a module that is not on it: random._os is the module os
    return None if name and isinstance(value, types.ModuleType) else value
