"""A judge: a model behind any OpenAI-compatible endpoint (OpenAI's, `vllm serve`, ..), queried at a limited rate.

    messages -> cache on disk -> pace -> endpoint, with retries and a deadline -> text, or a JudgeError with the cause

Retries, their back-off and `Retry-After` are those of OpenAI's own client; the size of a response is limited (`http_client`).
`judge_form` quotes untrusted text in the messages.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ray.config.reward import JUDGE_DEADLINE_S, KEY_VARIABLE
from grpo_ray.data.plain_text import whole_characters
from grpo_ray.errors import JudgeError
from grpo_ray.secrets import hide_forms, hide_secrets

Message = dict[str, str]
_MARK_CHARS = 12


@dataclass(frozen=True)
class JudgeOptions:
    model: str
    base_url: str = "https://api.openai.com/v1"
    temperature: float = 0.0
    max_tokens: int = 1024
    deadline_s: float = JUDGE_DEADLINE_S
    """The deadline for one question, its retries included."""
    retries: int = 4
    concurrency: int = 16
    """The number of concurrent questions."""
    requests_per_minute: float | None = None
    """The rate limit of this process. None: unlimited."""
    cache: str | None = None
    """A file (SQLite) of earlier answers, which several processes may share. None: they are kept as long as the process lives."""


class Judge:
    """The client of a judge, for one event loop. The key is in the environment, OPENAI_API_KEY."""

    def __init__(self, options: JudgeOptions) -> None:
        from grpo_ray.rewards.endpoints.http_client import make_client

        self._options = options
        self._client = make_client(options.base_url, timeout_s=options.deadline_s, retries=options.retries)
        self._turns = asyncio.Semaphore(options.concurrency)
        self._cache = _Cache(options.cache)
        self._next_slot = 0.0

    def mark(self, question: Sequence[str]) -> str:
        """A word for the tags of a question that only readers of the cache can know. It is derived from the cache's random secret,
        so that the same question gets the same word, and its answer is found again."""
        return hmac.new(self._cache.secret, json.dumps(question).encode(), hashlib.sha256).hexdigest()[:_MARK_CHARS]

    async def ask(self, messages: Sequence[Message]) -> str:
        """The judge's answer.

        Raises:
            JudgeError: the judge can't be reached, refuses, or does not answer in time.
        """
        question = {
            "model": self._options.model,
            "messages": list(messages),
            "temperature": self._options.temperature,
            "max_tokens": self._options.max_tokens,
        }
        if (known := self._cache.get(question)) is not None:
            return known
        async with self._turns:
            await self._pace()
            answer = await self._ask(question)
        self._cache.put(question, answer)
        return answer

    async def close(self) -> None:
        await self._client.close()

    async def _pace(self) -> None:
        """Wait for the next of evenly spaced slots: a burst at the start of every minute would be refused."""
        if self._options.requests_per_minute is None:
            return
        now = asyncio.get_running_loop().time()
        slot = max(now, self._next_slot)
        self._next_slot = slot + 60.0 / self._options.requests_per_minute
        await asyncio.sleep(slot - now)

    async def _ask(self, question: dict[str, Any]) -> str:
        import openai

        from grpo_ray.rewards.endpoints.http_client import RefusedAnswerError, post_json

        o = self._options
        where = f"the judge {o.model} at {hide_forms(o.base_url)}"
        try:
            async with asyncio.timeout(o.deadline_s):
                answer = await post_json(self._client, "/chat/completions", question)
        except (TimeoutError, openai.APITimeoutError):
            raise JudgeError(f"{where} did not answer within {o.deadline_s:g} s; raise deadline_s") from None
        except openai.RateLimitError as e:
            raise JudgeError(
                f"{where} still refuses for its rate limit after {o.retries} retries; lower requests_per_minute: {_line(e)}"
            ) from None
        except (openai.AuthenticationError, openai.PermissionDeniedError) as e:
            raise JudgeError(
                f"{where} refuses the key; give it by reward.env: {{{KEY_VARIABLE}: ${{{KEY_VARIABLE}}}}}: {_line(e)}"
            ) from None
        except openai.NotFoundError as e:
            raise JudgeError(f"{where} is not there: no such model, or the URL lacks its /v1: {_line(e)}") from None
        except openai.APIConnectionError as e:
            raise JudgeError(
                f"{where} can't be reached, after {o.retries} retries: {_line(e.__cause__ or e)}"
            ) from None
        except openai.APIStatusError as e:
            if 300 <= e.status_code < 400:
                to = e.response.headers.get("location", "")
                raise JudgeError(f"{where} sends on to {to[:200]!r}; give that as base_url, if it is meant") from None
            raise JudgeError(f"{where} answers with status {e.status_code}: {_line(e)}") from None
        except RefusedAnswerError as e:
            raise JudgeError(f"{where} gave no answer that can be used: {_line(e)}") from None
        except openai.OpenAIError as e:
            raise JudgeError(f"{where}: {type(e).__name__}: {_line(e)}") from None
        text = _content(answer)
        if not text:
            raise JudgeError(f"{where} gave an empty answer; does max_tokens ({o.max_tokens}) leave room for one?")
        return text


def _content(answer: Any) -> str:
    """The text of a chat completion; empty if there is none."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return ""
    return whole_characters(text) if isinstance(text, str) else ""


class _Cache:
    def __init__(self, path: str | None) -> None:
        try:
            if path is not None:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            # Without a name SQLite uses a temporary file, which disappears with the process.
            self._db = sqlite3.connect(path or "", timeout=30, isolation_level=None)
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
            self._db.execute("CREATE TABLE IF NOT EXISTS secret (id INTEGER PRIMARY KEY, value BLOB NOT NULL)")
            self._db.execute("INSERT OR IGNORE INTO secret VALUES (1, ?)", (secrets.token_bytes(32),))
            self.secret = bytes(self._db.execute("SELECT value FROM secret").fetchone()[0])
        except (OSError, sqlite3.Error) as e:
            raise JudgeError(f"the judge's cache {path} can't be opened ({e}); name another file") from None

    def get(self, question: dict[str, Any]) -> str | None:
        row = self._db.execute("SELECT answer FROM answers WHERE key = ?", (_key(question),)).fetchone()
        return None if row is None else str(row[0])

    def put(self, question: dict[str, Any], answer: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (_key(question), answer))


def _key(question: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()


def _line(error: BaseException) -> str:
    return hide_secrets((str(error).strip().splitlines() or [type(error).__name__])[0])[:200]
