"""Third-party code that judges texts, in a long-lived sandbox: starting one for each text would take longer than judging it.

    Verifier -- items, many in a message --> [worker: verify(*item)] -- a line of JSON for each --> results

A worker that dies at an item (its time, its memory, a fault) is replaced, and the next items continue there. Nothing about a
worker's messages is trusted but their form.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import marshal
import os
import pickle
import signal
import socket
import sys
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grpo_ray import json_text
from grpo_ray.errors import RewardError
from grpo_ray.sandbox.box import Box, BoxEnded, Limits
from grpo_ray.sandbox.inside import HEADER_BYTES
from grpo_ray.sandbox.isolation import Languages

T = TypeVar("T")
LIMITS = Limits(timeout_s=float("inf"), cpu_s=2, memory_mb=2048, processes=2, file_mb=1, disk_mb=2, watch_s=1.0)
"""The limits of a worker; `cpu_s` is for each item."""
ITEM_S = 60
"""The wall time for one item; one that computes is stopped earlier, by its processor time."""
START_S = 300.0
"""The deadline for the imports; a busy machine needs many seconds."""
MAX_ITEMS = 1024
"""The largest number of items in one message."""
MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True)
class Ended:
    """The end of the worker at an item: it ended there twice, or took all of its time."""

    how: str


class Verifier:
    """A verifier with one sandbox at a time, started at the first call. It is for one thread at a time."""

    def __init__(self, source: str, imports: Sequence[str], limits: Limits = LIMITS) -> None:
        self._source = source
        self._imports = imports
        self._limits = limits
        self._turn = threading.Lock()
        self._session: _Session | None = None

    def __call__(self, items: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The result of `verify` for each item (`sendable`), or an `Ended`.

        Raises:
            RewardError: there is no sandbox, or its contents can't be measured.
        """
        with self._turn:
            results: list[Any] = []
            again = False
            while len(results) < len(items):
                replies, end = self._ask(items[len(results) : len(results) + MAX_ITEMS])
                results += replies
                again = again and not replies
                if end is not None:
                    # The memory may have been used by earlier items.
                    if again or end.out_of_cpu:
                        results.append(Ended(end.how))
                    again = not again and not end.out_of_cpu
            return results

    def start(self) -> None:
        with self._turn:
            self._running()

    def close(self) -> None:
        session, self._session = self._session, None
        if session is not None and session.pid == os.getpid():
            session.close()

    def _running(self) -> _Session:
        if self._session is None or self._session.pid != os.getpid():
            self._session = _Session(self._source, self._imports, self._limits)
        return self._session

    def _ask(self, items: Sequence[tuple[Any, ...]]) -> tuple[list[Any], _End | None]:
        """The replies to the first of the items, and what ended the worker at the next one."""
        session = self._running()
        try:
            return session.ask(items)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as e:
            self._session = None
            return session.replies, _End(session.why_ended() or f"{type(e).__name__}: {e}", 0)
        except BaseException:
            self.close()
            raise


@dataclass(frozen=True)
class _End:
    how: str
    code: int

    @property
    def out_of_cpu(self) -> bool:
        return self.code == -signal.SIGXCPU


class _Session:
    """One sandbox and the socket to its worker."""

    def __init__(self, source: str, imports: Sequence[str], limits: Limits) -> None:
        self.pid = os.getpid()
        self.replies: list[Any] = []
        """The replies to the items that were sent last."""
        self._lines: deque[bytes] = deque()
        self._rest = b""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._box = _run(_start(source, imports, limits, theirs.fileno()))
            except BaseException:
                ours.close()
                raise
            self._serving = _run(_begin(self._box, theirs.fileno()))
        self._socket = ours
        self._socket.settimeout(START_S)
        try:
            self._line()
        except (OSError, EOFError):
            why = self.why_ended() or f"its imports took more than {START_S:g} s"
            raise RewardError(f"no sandbox for {', '.join(imports)} can be started: {why}") from None

    def ask(self, items: Sequence[tuple[Any, ...]]) -> tuple[list[Any], _End | None]:
        """The replies. Raises OSError, EOFError, ValueError, KeyError, TypeError if the sandbox has ended or sends nonsense."""
        self.replies = []
        self._socket.settimeout(ITEM_S * (len(items) + 1))
        body = marshal.dumps(list(items))
        self._socket.sendall(len(body).to_bytes(HEADER_BYTES, "little") + body)
        while len(self.replies) < len(items):
            reply = json_text.read(self._line())
            if isinstance(reply, dict):
                return self.replies, _End(_words(reply), int(reply["ended"]))
            self.replies.append(reply)
        return self.replies, None

    def why_ended(self) -> str:
        """The reason of the end; the sandbox is then closed.

        Raises:
            RewardError: it could not be measured.
        """
        self._socket.close()
        return _run(_close(self._box, self._serving))

    def close(self) -> None:
        with contextlib.suppress(RewardError):
            self.why_ended()

    def _line(self) -> bytes:
        while not self._lines:
            part = self._socket.recv(1 << 18)
            if not part or len(self._rest) > MAX_LINE_BYTES:
                raise EOFError
            *lines, self._rest = (self._rest + part).split(b"\n")
            self._lines.extend(lines)
        return self._lines.popleft()


def library_folders(*modules: str) -> tuple[str, ...]:
    """The folders in which these packages and their imports are installed."""
    own = [os.path.dirname(os.path.dirname(str(s.origin))) for m in modules if (s := importlib.util.find_spec(m))]
    installed = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages")]
    return tuple(dict.fromkeys(p for p in [*own, *installed] if os.path.isdir(p)))


_CLASS = b"\x93"
"""The byte that pickle writes (nothing reads it) before each object of a class other than Python's own plain ones."""


def sendable(value: Any) -> Any:
    """The value in types that marshal keeps: a text of numpy's would arrive as bytes.

    Raises:
        RewardError: the value has no such type, or is nested too deeply.
    """
    with contextlib.suppress(Exception):
        if _CLASS not in pickle.dumps(value, protocol=4):
            return value
    try:
        return _plain(value)
    except RecursionError:
        raise RewardError("a row is nested too deeply for a verifier") from None


def _plain(value: Any) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, float, str, bytes, complex):
        return value
    if isinstance(value, dict):
        return {_plain(k): _plain(v) for k, v in value.items()}
    for base in (list, tuple, set, frozenset):
        if isinstance(value, base):
            return base(map(_plain, value))
    if isinstance(value, str):
        return str(value)
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    raise RewardError(f"a {kind.__name__} in a row can't be given to a verifier; use numbers, texts, lists and dicts")


def _words(reply: dict[str, Any]) -> str:
    code = int(reply["ended"])
    lines = [line for line in str(reply["trouble"])[-500:].splitlines() if line.strip()]
    return (f"signal {-code}" if code < 0 else f"exit code {code}") + (f", {lines[-1]}" if lines else "")


async def _start(source: str, imports: Sequence[str], limits: Limits, fd: int) -> Box:
    languages = Languages(python_path=library_folders(*imports))
    return await Box.start(source, limits, languages, imports=imports, pass_fds=(fd,))


async def _begin(box: Box, fd: int) -> asyncio.Task[Any]:
    return asyncio.create_task(box.verify(fd, ITEM_S))


async def _close(box: Box, serving: asyncio.Task[Any]) -> str:
    """Close the sandbox; returns why it had ended, "" if it had not."""
    await asyncio.wait([serving], timeout=0.2)
    ended = serving.done()
    serving.cancel()
    await box.close()
    error = (await asyncio.gather(serving, return_exceptions=True))[0]
    if isinstance(error, RewardError):
        raise error
    return str(error) if ended and isinstance(error, BoxEnded) else ""


class _Loop:
    """The event loop that watches long-lived sandboxes: a thread of its own, as long as the process."""

    pid = 0
    loop: asyncio.AbstractEventLoop
    turn = threading.Lock()


def _run(work: Coroutine[Any, Any, T]) -> T:
    with _Loop.turn:
        if _Loop.pid != os.getpid():
            _Loop.pid, _Loop.loop = os.getpid(), asyncio.new_event_loop()
            threading.Thread(target=_Loop.loop.run_forever, name="sandboxes", daemon=True).start()
    future = asyncio.run_coroutine_threadsafe(work, _Loop.loop)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise
