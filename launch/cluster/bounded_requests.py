"""A bound on the size of a response that Ray's own HTTP clients read: they use `requests`, which reads any length."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from requests import PreparedRequest, Response, sessions
from requests.adapters import HTTPAdapter
from requests.exceptions import ContentDecodingError

MAX_ANSWER_BYTES = 64 << 20
"""The limit of one response, unpacked. The longest are logs of jobs: a line a step, 600,000 steps."""
CHUNK_BYTES = 1 << 16
CONNECT_S, QUIET_S, READ_S = 10.0, 300.0, 300.0
"""The time limits: to connect, for a response to begin or continue, and to read all of it."""


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
    """A response of urllib3, read to a bound."""

    def __init__(self, answer: Any) -> None:
        self._answer = answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._answer, name)

    def stream(self, _amount: int, decode_content: bool | None = None) -> Iterator[bytes]:
        read, end = 0, time.monotonic() + READ_S
        # This reads what has arrived, not as much as was requested, which may trickle.
        while chunk := self._answer.read1(CHUNK_BYTES, decode_content=decode_content):
            read += len(chunk)
            if read > MAX_ANSWER_BYTES or time.monotonic() > end:
                self._answer.close()
                raise ContentDecodingError(f"its answer is longer than {MAX_ANSWER_BYTES:,} bytes, or {READ_S:g} s")
            yield chunk


def bound_requests() -> None:
    """Bound every session that is created from now on, including Ray's, which are created anew for each request."""
    sessions.HTTPAdapter = BoundedAdapter  # type: ignore[misc]
