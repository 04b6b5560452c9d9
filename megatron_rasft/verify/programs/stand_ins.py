"""Lets tests use a program that runs in another process: the tester's end of the socket, and the stand-ins.

Tests are written and run as if they had imported the program. Its functions, classes and objects are stand-ins that
send each operation to the candidate. So the program sees the arguments of its calls and nothing else: neither the
tests nor the expected values nor the verdict.
"""

import builtins
import collections
import contextlib
import socket
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from megatron_rasft.verify.programs.empty_arrays import refusing_empty
from megatron_rasft.verify.programs.messages import (
    MUTABLE,
    PLAIN_BASES,
    CandidateEndedError,
    CannotCrossError,
    Channel,
    Codec,
    look_up_shared,
    shared_name,
)

# Special methods (without the underscores) that a stand-in sends to the program's object
_FORWARDED = (
    "len getitem setitem delitem bool str repr hash iter next enter int float index complex abs neg pos invert "
    "round trunc floor ceil reversed format bytes"
).split()
# Attributes with two underscores that tests may read of the program's objects
_VISIBLE_DUNDERS = frozenset("__name__ __qualname__ __doc__ __dict__ __annotations__ __members__".split())
# Operators that are sent only if both operands are objects of the program: see RemoteObject
_BETWEEN_OBJECTS = (
    "lt le gt ge add sub mul truediv floordiv mod pow matmul and or xor lshift rshift divmod".split()
)


class TesterSide(Codec):
    """The tester's end of the socket: gives the tests stand-ins for the names that the program defines.

    Args:
        stream: the socket to the candidate.
        max_bytes: the longest message in either direction.
        own_module: ``__module__`` of classes that the tests define. Their instances stay in this process, and the
            program may call them and read their public attributes.
    """

    def __init__(self, stream: socket.socket, max_bytes: int, own_module: str) -> None:
        self._channel = Channel(stream, max_bytes)
        self._own_module = own_module
        self._exported: dict[int, Any] = {}
        self._stand_ins: dict[int, Any] = {}
        self.fault: BaseException | None = None
        """The first CandidateEndedError or CannotCrossError. It is kept here because tests may catch the exception."""

        self.num_uses = 0
        """Number of operations on the program's objects so far. Tests that pass without any do not check the program."""

        self.found: set[str] = set()
        """Names at the program's top level that were looked up and that it defines."""

        self.expects_errors = True
        """Whether the running test may handle an exception of the program. If it cannot, ``ignored`` keeps the exception."""

        self.expects_stop = True
        """Whether the running test may handle StopIteration."""

        self.ignored: BaseException | None = None
        """The first exception of a call that no handler of the tests can have expected. The test must fail with this exception."""

        self._is_holding = False
        # Changes that the program made to arguments, and that are held back: the argument and its new value
        self._held: list[tuple[Any, Any]] = []
        # The latest exceptions of the program, which are compared by identity
        self._raised: collections.deque[BaseException] = collections.deque(maxlen=1000)
        self._num_callbacks = 0

    def started(self, has_star_imports: bool = False) -> str:
        """Waits until the program has been loaded. Returns the error that ended it, or an empty string.

        Args:
            has_star_imports: whether the program runs after the imports that LiveCodeBench's runner supplies.
        """
        self._channel.send(["start", has_star_imports])
        status, *rest = self._answer()
        return "" if status == "started" else str(rest[0] if rest else "")[:200]

    def get(self, name: str) -> Any:
        """Returns the value or stand-in of a name at the program's top level.

        Raises:
            AttributeError: the program does not define the name.
        """
        try:
            value = self._ask("get", name)
        except (AttributeError, CandidateEndedError, CannotCrossError):
            raise
        except BaseException as error:
            # The program raised it, for example in a property of the value's class
            raise CandidateEndedError(
                f"the program's {name} cannot be read: {type(error).__name__}"
            ) from None
        self.found.add(name)
        return value

    def hold_changes(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns ``function`` with its changes of arguments held back until ``release_changes``, unless it returns None."""

        def holding(*args: Any, **keywords: Any) -> Any:
            self._is_holding = True
            try:
                return function(*args, **keywords)
            finally:
                self._is_holding = False

        return holding

    def release_changes(self) -> None:
        """Applies the changes that are held back."""
        held, self._held = self._held, []
        for original, current in held:
            _bring_up_to_date(original, current)

    def defines(self, name: str) -> bool:
        """Returns whether the program defines a name at its top level."""
        with contextlib.suppress(AttributeError):
            self.get(name)
        return name in self.found

    def has_raised(self, error: BaseException) -> bool:
        """Returns whether the program raised this exception, rather than the tests."""
        return any(error is raised for raised in self._raised)

    def operate(self, operation: str, target: int, *args: Any, **keywords: Any) -> Any:
        """Runs one operation on an object of the program, then copies its changes into the mutable arguments.

        Args:
            operation: ``call``, ``getattr``, ``special``, ... as ``candidate`` names them.
            target: the stand-in's object number.
            args: operands.
            keywords: keyword operands of ``call``.
        """
        self.num_uses += 1
        return self._ask(operation, target, *args, **keywords)

    def received_array(self, array: Any) -> Any:
        """Returns an array of the program. An empty one does not equal or combine with arrays that are not empty."""
        return array if array.size else refusing_empty(array)

    def reference(self, value: Any) -> dict[str, Any]:
        """Returns a JSON name for a value: side "receiver" for an object of the program, "sender" for an object of this process."""
        if isinstance(value, _STAND_INS):
            return {"t": "receiver", "v": _number_of(value)}
        if isinstance(value, type) and issubclass(value, BaseException) and "_number" in vars(value):
            return {"t": "receiver", "v": vars(value)["_number"]}
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
            return {"t": "sender", "v": id(value)}
        for base in PLAIN_BASES:
            if isinstance(value, base):
                return self.encode(base(value))  # type: ignore[no-any-return]
        raise CannotCrossError(f"the tests pass a {type(value).__name__} to the program")

    def dereference(self, tag: str, value: Any) -> Any:
        """Returns the tests' own object for "receiver", a stand-in for "sender"."""
        if tag == "receiver":
            return self._exported[value]
        if tag == "shared":
            module, name = value
            found = look_up_shared(str(module), str(name))
            if found is None:
                raise CandidateEndedError("the program sent an invalid message")
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
                # Python cannot combine these bases: the program claims a class that cannot exist
                return type(str(name), parents[:1], {"_number": number})
        stand_in = {"class": RemoteClass, "callable": RemoteCallable}.get(kind, RemoteObject)
        return stand_in(self, number)

    def _error_class(self, encoded: Any) -> type[Exception]:
        """Returns a builtin exception by its name, or the stand-in of an exception class of the program."""
        if isinstance(encoded, str):
            found = getattr(builtins, encoded, None)
            if encoded == "SystemExit":
                return SystemExit  # type: ignore[return-value]
            # MemoryError is kept for the tests' own process, where it makes the verdict "unverifiable"
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
            raise self._noted(error, operation, args)
        return value

    def _noted(self, error: BaseException, operation: str, args: tuple[Any, ...]) -> BaseException:
        """Records an exception of the program. Returns the one to raise in the tests.

        ``all(map(f, inputs))`` takes a StopIteration of ``f`` for the end of the inputs and is true. As in a generator, a
        StopIteration therefore becomes a RuntimeError, unless the tests ask an iterator for its next item.
        """
        is_next = operation == "special" and args[1:2] == ("next",)
        if isinstance(error, StopIteration | StopAsyncIteration) and not is_next and not self.expects_stop:
            error = RuntimeError(f"the program raised {type(error).__name__}")
        # An exception in a callback goes back to the program, which may handle it
        if operation == "call" and not self.expects_errors and not self._num_callbacks:
            self.ignored = self.ignored or error
        self._raised.append(error)
        return error

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
            raise CandidateEndedError("the program sent an invalid message") from None
        except MemoryError:
            raise CandidateEndedError("the program returned a value that needs too much memory") from None

    def _settle(
        self, status: str, rest: list[Any], args: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, BaseException | None]:
        """Prints the program's output, copies changed arguments, and returns ``(value, None)`` or ``(None, error)``."""
        content, printed, changed = rest
        if printed:
            sys.stdout.write(str(printed))
        value = self.decode(content) if status == "value" else None
        for place, encoded in changed:
            original = keywords[place] if isinstance(place, str) else args[place]
            current = self.decode(encoded)
            if self._is_holding and value is not None:
                self._held.append((original, current))
            else:
                _bring_up_to_date(original, current)
        if status == "value":
            return value, None
        if status != "raised":
            raise ValueError(status)
        kind, arguments, text, attributes = content
        return None, self._error(self._error_class(kind), self.decode(arguments), str(text), attributes)

    def _error(self, kind: type[Exception], args: Any, text: str, attributes: Any) -> Exception:
        try:
            error = kind(*args)
        except Exception:
            # UnicodeDecodeError, for example, requires arguments that the program may not have given
            error = RuntimeError(text)
        if "_number" in vars(kind) and str(error) != text:
            error.args = (text,)
        for name, value in attributes:
            if isinstance(name, str) and name.isidentifier() and not name.startswith("_"):
                setattr(error, name, self.decode(value))
        return error

    def _answer(self) -> list[Any]:
        """Waits for the reply to a request, and meanwhile runs the calls that the program makes to the tests' objects."""
        while True:
            message = self._channel.receive()
            if message[0] != "call back":
                return message
            self._num_callbacks += 1
            reply = self._serve(message[1:])
            self._num_callbacks -= 1
            self._channel.send(reply)

    def _serve(self, request: list[Any]) -> list[Any]:
        """Runs one operation that the program requests on an object of the tests, and returns the reply.

        The program reaches only objects that the tests passed to it, and no attribute that begins with an underscore.
        """
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
                raise AttributeError(f"{operation} is not allowed on a {type(target).__name__} of the tests")
            if operation == "getattr":
                return ["value", self.encode(getattr(target, args[0]))]
            if operation == "setattr":
                setattr(target, args[0], args[1])
                return ["value", None]
            raise AttributeError(operation)
        except Exception as error:
            return ["error", type(error).__name__, str(error)[:1000]]


def _bring_up_to_date(original: Any, current: Any) -> None:
    """Copies the program's changes into a mutable value in place, descending where both have the same shape.

    Objects inside the value keep their identity, because the tests may hold references to them.
    """
    if type(original) is not type(current) or not isinstance(original, (*MUTABLE, tuple)):
        return
    if isinstance(original, (list, tuple)) and len(original) == len(current):
        for index, (old, new) in enumerate(zip(original, current, strict=True)):
            if isinstance(old, MUTABLE) and type(old) is type(new):
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
            if isinstance(old, MUTABLE) and type(old) is type(new):
                _bring_up_to_date(old, new)
                new = old
            original[key] = new
    elif isinstance(original, (set, collections.deque)):
        original.clear()
        (original.update if isinstance(original, set) else original.extend)(current)


# object.__getattribute__ below: the stand-in's own attribute access would send the name to the program
def _number_of(stand_in: Any) -> int:
    number: int = object.__getattribute__(stand_in, "_number")
    return number


def _operate(stand_in: Any, operation: str, *args: Any, **keywords: Any) -> Any:
    side: TesterSide = object.__getattribute__(stand_in, "_side")
    return side.operate(operation, _number_of(stand_in), *args, **keywords)


class RemoteObject:
    """The stand-in of an object in the program's process.

    The program must neither see the expected value nor decide whether its result matches. So comparison with a plain
    value is always unequal, order and arithmetic with a plain value raise TypeError, and ``in`` iterates over the object instead
    of calling its ``__contains__``. Operators between two objects of the program are the program's.
    """

    def __init__(self, side: TesterSide, number: int) -> None:
        object.__setattr__(self, "_side", side)
        object.__setattr__(self, "_number", number)

    def __getattr__(self, name: str) -> Any:
        # Not sent to the program: pytest and unittest look for their own attributes on every object
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

    def __exit__(self, kind: Any = None, error: Any = None, trace: Any = None) -> bool:
        # The program is not given a failed assert of the tests, because it could suppress it
        is_failure = isinstance(error, AssertionError)
        details = (None, None, None) if is_failure else (kind, error, trace)
        is_handled = bool(_operate(self, "special", "exit", *details))
        return is_handled and not is_failure

    def __dir__(self) -> list[str]:
        return [str(name) for name in _operate(self, "dir")]


class RemoteCallable(RemoteObject):
    """The stand-in of a function, a method or another callable."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return _operate(self, "call", *args, **keywords)


class RemoteClass(RemoteCallable):
    """The stand-in of a class."""

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
