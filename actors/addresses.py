"""The address of the Ray cluster: which one is meant, who names it, and whether anything answers there. This takes seconds, where
Ray's own client would try for a quarter of an hour."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from actors.private import private_folder
from grpo_ray.errors import ConfigError, ResourceError

VARIABLE = "RAY_ADDRESS"
OPTION = "cluster.address"
ANSWER_S = 8.0
"""How long a running head may take to answer; one that restarts is asked again within it."""
AGAIN_S = 0.5
PROXY_EXCEPTIONS = ("no_proxy", "NO_PROXY")
EVERYWHERE = "*"
RAYLET, HEAD_FLAG = "raylet", "--gcs-address="
LOCAL = ("localhost", "127.0.0.1", "::1")
_HOST_AND_PORT = re.compile(r"(?:ray://)?(?:[\w.-]+|\[[\w:.%-]+\]):\d+/?", re.ASCII)


@dataclass(frozen=True)
class Address:
    """The address of a running cluster: `HOST:PORT` of its head, `ray://HOST:PORT` of Ray's client server, or `auto`."""

    where: str
    source: str
    """The option or the environment variable that names it."""

    def __str__(self) -> str:
        return f"{self.where} (from {self.source})"

    @property
    def mend(self) -> str:
        return (
            f"unset {VARIABLE} to start a cluster on this machine, or set it to the address of a head that runs"
            if self.source == VARIABLE
            else f"leave {OPTION} out to start a cluster on this machine, or name a head that runs"
        )


def read_address(option: str | None) -> Address | None:
    """The cluster to join by `cluster.address`, else by the environment; None: start one here."""
    named = os.environ.get(VARIABLE, "").strip()
    # An empty option counts as unset, as an empty variable does.
    said = (option or "").strip()
    if said and said != "auto":
        found = Address(said, OPTION)
    elif named:
        found = Address(named, VARIABLE)
    elif said:
        found = Address(said, OPTION)
    else:
        return None
    return None if found.where == "local" else found


def host_and_port(address: Address) -> tuple[str, int] | None:
    """The host and the port of an address; None for `auto`, which Ray looks up.

    Raises:
        ConfigError: it is not the address of a cluster that a run can join.
    """
    where = address.where
    if where == "auto":
        return None
    if where.startswith(("http://", "https://")):
        raise ConfigError(
            f"{address} is a dashboard, where `grpo-ray submit` sends runs; this command joins a cluster at HOST:PORT of its head, "
            f"6379 as a rule: {address.mend}"
        )
    if not where.startswith("ray://") and "://" in where:
        raise ConfigError(f"{address} is no address of a Ray cluster; it reads HOST:PORT or auto: {address.mend}")
    try:
        parts = urlsplit(where if "://" in where else f"tcp://{where}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or not _HOST_AND_PORT.fullmatch(where):
        raise ConfigError(f"{address} is no address of a Ray cluster; it reads HOST:PORT or auto: {address.mend}")
    return host, port


def check_answers(address: Address, limit_s: float = ANSWER_S) -> str:
    """Check that a head answers, by its own protocol and without the token.

    Returns:
        The address for Ray: HOST:PORT instead of `auto`, by which Ray would show the token to whatever process says that it is one
        of Ray's.

    Raises:
        ConfigError: it is not an address.
        ResourceError: nothing answers there within `limit_s` seconds, or something else does.
    """
    at = host_and_port(address)
    if at is None:
        try:
            at = _running_here()
        except ConnectionError as e:
            raise ResourceError(f"{address} names no Ray cluster on this machine ({e}): {address.mend}") from None
    host, port = at
    bypass_proxies([host])
    give_up = time.monotonic() + limit_s
    _await_port(host, port, address, give_up)
    # Ray's client server has no such request, and fails by itself when nothing answers it.
    if not address.where.startswith("ray://") and not _is_head(host, port, max(1.0, give_up - time.monotonic())):
        raise ResourceError(
            f"what answers at {address} is no head of a Ray cluster, or it hangs: nothing of Ray's protocol within {limit_s:g} s; "
            f"{address.mend}"
        )
    return address.where if address.where != "auto" else f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _running_here() -> tuple[str, int]:
    """The address of the head that a raylet of this user, or of root, on this machine belongs to.

    Raises:
        ConnectionError: there is none, or there are several.
    """
    found = heads_here()
    meant = found & set(_last_started()) if len(found) > 1 else found
    if len(meant) != 1:
        raise ConnectionError("there is none of this user's" if not found else "there are several")
    host, _, port = meant.pop().rpartition(":")
    return host.strip("[]"), int(port)


def heads_here() -> set[str]:
    """The addresses of the heads that raylets of this user, or of root, on this machine belong to, and show the token to."""
    import psutil

    found: set[str] = set()
    for process in psutil.process_iter(["cmdline", "uids"]):
        words = process.info["cmdline"] or []
        uids = process.info["uids"]
        if words and os.path.basename(words[0]) == RAYLET and uids is not None and uids.real in (0, os.getuid()):
            found |= {word.partition("=")[2] for word in words if word.startswith(HEAD_FLAG)}
    return found


def _last_started() -> list[str]:
    """The addresses that `ray start` left in files, some of which other users may have written."""
    files = [Path(folder, "ray", "ray_current_cluster") for folder in (str(private_folder()), "/tmp")]
    for file in files:
        with contextlib.suppress(OSError, ValueError):
            return [file.read_text().strip()]
    return []


def _await_port(host: str, port: int, address: Address, give_up: float) -> None:
    """Raise ResourceError when the port takes no connection; a refusal is retried for a while, since the head may be restarting."""
    while True:
        left = give_up - time.monotonic()
        try:
            socket.create_connection((host, port), timeout=max(0.1, left)).close()
            return
        except OSError as e:
            # A name that does not resolve now will not resolve a moment later.
            if isinstance(e, socket.gaierror) or give_up - time.monotonic() < AGAIN_S:
                raise ResourceError(
                    f"no Ray cluster answers at {address} ({e.strerror or e}); is its head started? {address.mend}"
                ) from None
        except UnicodeError:
            raise ConfigError(f"{address} names no host: {address.mend}") from None
        time.sleep(AGAIN_S)


def _is_head(host: str, port: int, limit_s: float) -> bool:
    """Whether the port answers Ray's own liveness check. A head with a token answers that it needs the token first."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    options = [("grpc.enable_http_proxy", 0)]
    encrypted = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    channel = init_grpc_channel(name, options) if encrypted else grpc.insecure_channel(name, options)
    try:
        NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=limit_s, wait_for_ready=True)
    except grpc.RpcError as e:
        return bool(e.code() == grpc.StatusCode.UNAUTHENTICATED)
    finally:
        channel.close()
    return True


def bypass_proxies(hosts: Iterable[str], env: MutableMapping[str, str] = os.environ) -> None:
    """Send what this process and its children send to these hosts, and to this machine, there directly and through no proxy: the
    traffic carries Ray's token, which is a secret."""
    told = [entry.strip() for name in PROXY_EXCEPTIONS for entry in env.get(name, "").split(",")]
    # A star means everything only if it stands alone.
    entries = dict.fromkeys(entry for entry in (*told, *LOCAL, *hosts) if entry)
    wanted = EVERYWHERE if EVERYWHERE in entries else ",".join(entries)
    for name in PROXY_EXCEPTIONS:
        env[name] = wanted
