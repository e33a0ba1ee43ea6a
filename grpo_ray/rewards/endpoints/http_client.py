"""OpenAI's client with a limit on what a server makes it read: a number of bytes, uncompressed, only from the host of the request.

A server is as trusted as the network to it. Without a limit a response of 300 MB takes 780 MB, compressed ones any amount, and a
redirect sends the question to any host that it names.
"""

from __future__ import annotations

import os
from typing import Any

from openai import AsyncOpenAI, DefaultAsyncHttpxClient, OpenAIError

from grpo_ray.config.reward import KEY_VARIABLE

NO_KEY = "none"
"""The key for endpoints that need none; the client requires one."""
MAX_ANSWER_BYTES = 4 << 20
"""The largest size of one response, errors included. The longest reasoning of a judge is a hundredth of it."""


class RefusedAnswerError(OpenAIError):
    """A response that is not read to its end; OpenAI's client does not retry it."""


class BoundedClient(DefaultAsyncHttpxClient):
    """The HTTP client below OpenAI's: it reads a response completely or refuses it."""

    async def send(self, request: Any, **options: Any) -> Any:
        """The response to a request.

        Raises:
            RefusedAnswerError: the response is too long, or compressed.
        """
        request.headers["Accept-Encoding"] = "identity"
        answer = await super().send(request, **{**options, "stream": True, "follow_redirects": False})
        try:
            body = await _body(answer)
        finally:
            await answer.aclose()
        # The body is always JSON: the character set that a server names may be any codec of Python's.
        headers = [(name, value) for name, value in answer.headers.multi_items() if name not in _OF_BODY]
        headers.append(("Content-Type", "application/json"))
        return answer.__class__(answer.status_code, headers=headers, content=body, request=request)


_OF_BODY = ("content-type", "content-length", "transfer-encoding")


async def _body(answer: Any) -> bytes:
    encoding = answer.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise RefusedAnswerError(f"its answer is compressed ({encoding[:40]!r}), and that was not asked for")
    told = answer.headers.get("content-length", "")
    body = bytearray()
    if not told.isdecimal() or int(told) <= MAX_ANSWER_BYTES:
        async for chunk in answer.aiter_raw():
            body += chunk
            if len(body) > MAX_ANSWER_BYTES:
                break
        else:
            return bytes(body)
    raise RefusedAnswerError(f"its answer is longer than {MAX_ANSWER_BYTES:,} bytes")


def make_client(url: str, *, timeout_s: float, retries: int) -> AsyncOpenAI:
    """A client for any server of OpenAI's protocol; the key is in the environment, OPENAI_API_KEY."""
    return AsyncOpenAI(
        base_url=url,
        api_key=os.environ.get(KEY_VARIABLE) or NO_KEY,
        timeout=timeout_s,
        max_retries=retries,
        http_client=BoundedClient(base_url=url, timeout=timeout_s),
    )


async def post_json(client: AsyncOpenAI, path: str, body: dict[str, Any]) -> Any:
    """The server's response, as plain data.

    Raises:
        OpenAIError: there is none, or it is refused.
    """
    try:
        return await client.post(path, cast_to=object, body=body)
    except (ValueError, RecursionError):
        raise RefusedAnswerError("its answer is no JSON") from None
