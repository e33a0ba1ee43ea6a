"""A server that speaks S3, for the real client. It goes away and comes back on the same port, with what it holds."""

from __future__ import annotations

import json
import socket
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from moto.server import ThreadedMotoServer

LOCAL = "127.0.0.1"


@dataclass
class S3:
    port: int = 0
    _server: Any = field(default=None, repr=False)

    def start(self) -> None:
        if self._server is None:
            if self.port == 0:
                with socket.socket() as free:
                    free.bind((LOCAL, 0))
                    self.port = free.getsockname()[1]
            self._server = ThreadedMotoServer(ip_address=LOCAL, port=self.port, verbose=False)
            self._server.start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()
            self._server = None

    @property
    def url(self) -> str:
        return f"http://{LOCAL}:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """What clients read. No proxy, no other profile, and few attempts: a test waits for the last of them."""
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        return keys | {"AWS_ENDPOINT_URL": self.url, "AWS_MAX_ATTEMPTS": "1", "NO_PROXY": LOCAL, "no_proxy": LOCAL}

    def make_bucket(self, name: str) -> None:
        self._call("PUT", f"/{name}")

    def count_as_strangers(self, count: int | None) -> None:
        """Keys are looked at after so many requests more; None: never."""
        self._call("POST", "/moto-api/reset-auth", b"inf" if count is None else str(count).encode())

    def buckets(self) -> list[str]:
        data = self._call("GET", "/moto-api/data.json")
        return [bucket["name"] for bucket in json.loads(data)["s3"]["FakeBucket"]]

    def _call(self, method: str, path: str, data: bytes | None = None) -> bytes:
        request = urllib.request.Request(
            self.url + path, data=data, method=method, headers={"Content-Type": "text/plain"}
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=20) as answer:
            body: bytes = answer.read()
        return body


def forget_clients() -> None:
    """Filesystems are kept by URL: those of a test before would go on asking its own server."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
