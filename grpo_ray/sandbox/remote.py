"""Tests in one sandbox, the program in another; sent inside as source, like `inside`.

The tests see the program's functions and objects through `Remote`. What they receive is rebuilt from plain data, so `==` is the
tests' own; whatever is not plain data stays with the program, and is equal only to itself.
"""

from __future__ import annotations

import builtins
import json
import operator
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

PLAIN = (bool, int, float, str)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda f, *args, **kwargs: f(*args, **kwargs),
    **{f.__name__: f for f in (getattr, setattr, len, bool, iter, reversed, next, str, repr)},
    **{name: getattr(operator, name) for name in ("getitem", "setitem", "delitem", "contains")},
}
# Code that takes numbers out of an object by such a name reads memory at an address that the object chooses.
MEMORY = ("__array", "__cuda_array", "__dlpack")


class ProgramEnded(BaseException):
    """The other side has ended, or sends invalid messages."""


class ProgramError(Exception):
    """An exception that the program itself defined and raised."""


class Unfit(BaseException):
    """These tests can't be run this way, whatever the program does."""


def encode(value: Any, refer: Callable[[Any], Any]) -> Any:
    """The JSON of plain data; anything else goes through `refer`."""
    if value is None or type(value) in PLAIN:
        return value
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(v, refer) for v in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(k, refer), encode(v, refer)] for k, v in value.items()]]
    if isinstance(value, bytes | bytearray):
        return [type(value).__name__, value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    for plain in PLAIN:
        if isinstance(value, plain):
            return plain(value)
    return refer(value)


def decode(data: Any, referred: Callable[[int], Any]) -> Any:
    if not isinstance(data, list):
        return data
    kind, content = data
    match kind:
        case "list" | "tuple" | "set" | "frozenset":
            return getattr(builtins, kind)(decode(v, referred) for v in content)
        case "dict":
            return {decode(k, referred): decode(v, referred) for k, v in content}
        case "bytes" | "bytearray":
            return getattr(builtins, kind).fromhex(content)
        case "complex":
            return complex(*content)
        case "ref":
            return referred(content)
    raise ValueError(kind)


class Wire:
    """A connection for lines of JSON over a socket pair."""

    def __init__(self, fd: int) -> None:
        sys.set_int_max_str_digits(0)
        self._read = os.fdopen(fd, "rb")
        self._fd = fd

    def send(self, message: Any) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[os.write(self._fd, data) :]

    def receive(self) -> Any:
        line = self._read.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return json.loads(line)


def serve(namespace: dict[str, Any], fd: int) -> None:
    """Execute the operations of the tests on the program's objects, until they close the connection."""
    wire = Wire(fd)
    held: list[Any] = [namespace]

    def refer(value: Any) -> list[Any]:
        held.append(value)
        return ["ref", len(held) - 1]

    while True:
        try:
            name, target, args, kwargs = wire.receive()
        except EOFError:
            return
        try:
            given = [decode(a, held.__getitem__) for a in args]
            value = OPERATIONS[name](
                held[target], *given, **{k: decode(v, held.__getitem__) for k, v in kwargs.items()}
            )
            # The lists that it was given are returned: it may have been meant to change them in place.
            reply = ["ok", encode(value, refer), [encode(a, refer) for a in given]]
        except Exception as e:
            reply = ["raised", type(e).__name__, str(e)]
        wire.send(reply)


def rebuilt(error: str, message: str, operation: str) -> Exception:
    """The program's exception for the tests to catch. `map`, `zip` and `iter` take a StopIteration as their own end, so tests over
    them would pass; hence only `next` raises it."""
    known = getattr(builtins, error, None)
    raised: Exception = ProgramError(f"{error}: {message}")
    ends = () if operation == "next" else (StopIteration,)
    if isinstance(known, type) and issubclass(known, Exception) and not issubclass(known, (StopAsyncIteration, *ends)):
        try:
            raised = known(message)
        except TypeError:
            raised = ProgramError(message)
    vars(raised)["of_the_program"] = True
    return raised


class Client:
    """The tests' end of the connection."""

    def __init__(self, fd: int) -> None:
        self._wire = Wire(fd)
        self._known: dict[int, Remote] = {}
        self.calls = 0

    def ask(self, operation: str, target: int, *args: Any, **kwargs: Any) -> Any:
        self.calls += operation == "call"
        sent = [encode(a, self._refer) for a in args], {k: encode(v, self._refer) for k, v in kwargs.items()}
        try:
            self._wire.send([operation, target, *sent])
            kind, *rest = self._wire.receive()
            if kind == "ok":
                for before, sent_as, after in zip(args, sent[0], rest[1], strict=True):
                    if sent_as != after:
                        _change(before, decode(after, self._referred))
                return decode(rest[0], self._referred)
            error, message = rest
        except Exception as e:
            raise ProgramEnded(f"{type(e).__name__}: {e}") from None
        raise rebuilt(str(error), str(message), operation)

    def attribute(self, name: str) -> Any:
        """An attribute of the program as a module."""
        if not name.startswith("__"):
            try:
                return self.ask("getitem", 0, name)
            except KeyError:
                pass
        raise AttributeError(name)

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, Remote):
            return ["ref", object.__getattribute__(value, "_id")]
        raise Unfit(f"a test gives the program a {type(value).__name__}; only plain data can be passed to it")

    def _referred(self, number: int) -> Remote:
        return self._known.setdefault(number, Remote(self, number))


def _change(value: Any, new: Any) -> None:
    if isinstance(value, list | bytearray):
        value[:] = new
    elif isinstance(value, dict | set):
        value.clear()
        value.update(new)


class Remote:
    """An object of the program. It is compared by identity: its own `__eq__` could lie."""

    def __init__(self, client: Client, number: int) -> None:
        object.__setattr__(self, "_client", client)
        object.__setattr__(self, "_id", number)

    def _ask(self, operation: str, *args: Any, **kwargs: Any) -> Any:
        return self._client.ask(operation, self._id, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith(MEMORY):
            raise AttributeError(name)
        return self._ask("getattr", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("getitem", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("setitem", key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delitem", key)

    def __contains__(self, key: Any) -> bool:
        return self._ask("contains", key) is True

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __iter__(self) -> Iterator[Any]:
        return _iterator(self._ask("iter"))

    def __reversed__(self) -> Iterator[Any]:
        return _iterator(self._ask("reversed"))

    def __next__(self) -> Any:
        return self._ask("next")

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))


def _iterator(found: Any) -> Iterator[Any]:
    return _Iterator(found) if isinstance(found, Remote) else iter(found)


class _Iterator:
    def __init__(self, remote: Remote) -> None:
        self._remote = remote

    def __iter__(self) -> _Iterator:
        return self

    def __next__(self) -> Any:
        return self._remote.__next__()


def judge(request: dict[str, Any], result: int) -> None:
    """Run tests, and write one byte for each to `result`: `.` it passed, `x` it failed, `?` it can't be run here."""
    client = Client(request["fd"])
    namespace: dict[str, Any] = {"__name__": "__tests__", "__builtins__": builtins}
    program = type(sys)("solution")
    vars(program)["__getattr__"] = client.attribute
    sys.modules["solution"] = program
    for test, names in request["tests"]:
        try:
            _run_test(test, names, client, namespace)
            os.write(result, b".")
        except BaseException as e:
            unfit = isinstance(e, Unfit) or (isinstance(e, ImportError) and not _of_the_program(e))
            os.write(result, b"?" if unfit else b"x")
            os.write(2, f"{type(e).__name__}: {e}\n".encode(errors="replace")[-500:])
            if unfit or not request["all"]:
                return


def _of_the_program(error: ImportError) -> bool:
    """Whether the program raised it, or lacks the name that `from solution import` requests."""
    return hasattr(error, "of_the_program") or error.name == "solution"


def _run_test(test: str, names: list[str], client: Client, namespace: dict[str, Any]) -> None:
    """Run a test. `names` are those that it uses and neither defines nor finds among the builtins."""
    calls = client.calls
    code = compile(test, "tests", "exec", dont_inherit=True)
    for name in names:
        if name in sys.stdlib_module_names:
            namespace[name] = __import__(name)
        elif name not in namespace:
            try:
                namespace[name] = client.ask("getitem", 0, name)
            except KeyError:
                continue
    exec(code, namespace)
    for name in [n for n, v in namespace.items() if n.startswith("test_") and type(v) is type(judge)]:
        namespace.pop(name)()
    if client.calls == calls:
        raise Unfit("a test passed without calling the program once")
