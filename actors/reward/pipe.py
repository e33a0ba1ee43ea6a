"""The parent's end of the pipes to a scoring process: blocks of bytes go out, lines of JSON come back, each within a deadline."""

from __future__ import annotations

import json
import os
import select
import time
from typing import Any

from actors.reward.inside import HEADER

MAX_LINE_BYTES = 64 << 20
"""The longest line: a whole group with a step at every token is about ten MiB."""
WRITE_TIMEOUT_S = 30.0


class EndedError(Exception):
    """The process closed its pipe, or wrote something that is not an answer."""


class LateError(Exception):
    """The process did not answer in time."""


class ChildPipe:
    """The pipes to one process at a time; they belong to one thread."""

    def __init__(self) -> None:
        self._to_child = -1
        self._from_child = -1
        self._buffer = bytearray()

    def open(self) -> tuple[int, int]:
        """The ends of a new process: where it reads and where it writes. The caller closes them afterwards."""
        request_read, self._to_child = os.pipe()
        self._from_child, response_write = os.pipe()
        os.set_blocking(self._to_child, False)
        self._buffer.clear()
        return request_read, response_write

    def close(self) -> None:
        for fd in (self._to_child, self._from_child):
            if fd >= 0:
                os.close(fd)
        self._to_child = self._from_child = -1

    def write(self, body: bytes) -> None:
        data = memoryview(HEADER.pack(len(body)) + body)
        deadline = time.monotonic() + WRITE_TIMEOUT_S
        poll = select.poll()
        poll.register(self._to_child, select.POLLOUT)
        while data:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise LateError
            try:
                data = data[os.write(self._to_child, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise EndedError from None

    def read(self, deadline: float) -> dict[str, Any]:
        """The next line of the child, as JSON; `deadline` is by `time.monotonic`."""
        try:
            message = json.loads(self._line(deadline))
        except ValueError:
            raise EndedError from None
        if not isinstance(message, dict):
            raise EndedError
        return message

    def _line(self, deadline: float) -> bytes:
        poll = select.poll()
        poll.register(self._from_child, select.POLLIN)
        while (end := self._buffer.find(b"\n")) < 0:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise LateError
            chunk = os.read(self._from_child, 1 << 16)
            if not chunk or len(self._buffer) > MAX_LINE_BYTES:
                raise EndedError
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line
