"""A bound on what Ray's own HTTP clients read of an answer: they use `requests`, which reads whatever comes, however long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from requests import PreparedRequest, Response, sessions
from requests.adapters import HTTPAdapter
from requests.exceptions import ContentDecodingError

MAX_ANSWER_BYTES = 64 << 20
"""Of one answer, unpacked. The longest are logs of jobs: a line a step, 600,000 steps."""
CHUNK_BYTES = 1 << 16
CONNECT_S, QUIET_S, READ_S = 10.0, 300.0, 300.0
"""To connect, for an answer to begin or go on, and to read all of it."""


class BoundedAdapter(HTTPAdapter):
    def send(self, request: PreparedRequest, *args: Any, **options: Any) -> Response:
        if not args and options.get("timeout") is None:
            options["timeout"] = (CONNECT_S, QUIET_S)
        return super().send(request, *args, **options)

    def build_response(self, req: PreparedRequest, resp: Any) -> Response:
        response = super().build_response(req, resp)
        response.raw = _Bounded(resp)
        return response


class _Bounded:
    """urllib3's answer, read to a bound."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answer, name)

    def stream(self, _amount: int, decode_content: bool | None = None) -> Iterator[bytes]:
        read, end = 0, time.monotonic() + READ_S
        # What is there, and not so much as was asked for: that may trickle.
        while chunk := self._answer.read1(CHUNK_BYTES, decode_content=decode_content):
            read += len(chunk)
            if read > MAX_ANSWER_BYTES or time.monotonic() > end:
                self._answer.close()
                raise ContentDecodingError(f"its answer is longer than {MAX_ANSWER_BYTES:,} bytes, or {READ_S:g} s")
            yield chunk


def bound_requests() -> None:
    """Of every session that is made from now on, Ray's among them, which are made anew for each request."""
    sessions.HTTPAdapter = BoundedAdapter  # type: ignore[misc]
