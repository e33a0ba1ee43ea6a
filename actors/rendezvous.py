"""Groups of processes that only holders of their key can join. Ray hands out the key, through channels that its token protects.

torch's stores and gloo's sockets do not authenticate: whoever reaches a store's port reads and writes what is in it, and a
socket accepts the first caller. So
    the port      listens on one address: loopback where all members are on one node, else the node's own
    the store     holds what is sealed under the key and its own name (AES-GCM); anything else is refused
    the sockets   every two members prove to each other that they have the key, as soon as they are connected
What travels between members afterwards is tensors; nothing is unpickled.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from torch import Tensor
from torch.distributed import ProcessGroupGloo, distributed_c10d

from actors.runtime import LOOPBACK

KEY_BYTES = 32
PROOF_BYTES = 32
TEXT_BYTES = 4096
_SEAL_BYTES = 12
_BACKLOG = 1024
_QUESTION, _PROOF = 7001, 7002
"""The tags of the messages of a proof."""


class StrangerError(RuntimeError):
    """Something in a group of processes comes from a process without the key."""


def new_key() -> bytes:
    return secrets.token_bytes(KEY_BYTES)


@dataclass(frozen=True)
class Meeting:
    """Where the members of a group meet, and the key by which they know each other; it travels through Ray alone."""

    host: str
    port: int
    key: bytes = field(repr=False)

    def own_address(self, of_node: str) -> str:
        """The address that a member listens on, on the node of this address."""
        return LOOPBACK if self.host == LOOPBACK else of_node


def listen_at(host: str) -> socket.socket:
    """A socket that listens on a free port of this address and no other."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, 0), family=family, backlog=_BACKLOG)


class SealedStore(dist.Store):
    """A store in which members read only what members wrote, each value under its own name. Counters (`add`) are as in the inner
    store: only waiting times depend on them."""

    def __init__(self, inner: dist.Store, key: bytes) -> None:
        super().__init__()
        self._inner = inner
        self._key = key
        self._cipher = AESGCM(key)

    def set(self, name: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        salt = os.urandom(_SEAL_BYTES)
        self._inner.set(name, salt + self._cipher.encrypt(salt, data, name.encode()))  # type: ignore[arg-type]

    def get(self, name: str) -> bytes:
        sealed = self._inner.get(name)
        try:
            return self._cipher.decrypt(sealed[:_SEAL_BYTES], sealed[_SEAL_BYTES:], name.encode())
        except (InvalidTag, ValueError):
            raise StrangerError(
                f"the store of a process group holds under {name!r} what no member of the group wrote: another process reached its "
                "port; see launch/guide/security.md for who should be able to"
            ) from None

    def add(self, name: str, amount: int) -> int:
        return self._inner.add(name, amount)

    def check(self, names: list[str]) -> bool:
        return self._inner.check(names)

    def wait(self, names: list[str], timeout: timedelta | None = None) -> None:
        self._inner.wait(names, *([] if timeout is None else [timeout]))

    def delete_key(self, name: str) -> bool:
        return self._inner.delete_key(name)

    def num_keys(self) -> int:
        return self._inner.num_keys()

    def clone(self) -> SealedStore:
        return SealedStore(self._inner.clone(), self._key)  # type: ignore[attr-defined]


def open_store(meeting: Meeting, timeout: timedelta, listening: socket.socket | None = None) -> SealedStore:
    """The store of a meeting. The member with the listening socket holds it; the others connect."""
    served: dict[str, Any] = {} if listening is None else {"master_listen_fd": listening.detach()}
    try:
        inner = dist.TCPStore(
            meeting.host,
            meeting.port,
            is_master=listening is not None,
            wait_for_workers=False,
            timeout=timeout,
            **served,
        )
    except BaseException:
        with suppress(OSError):
            socket.close(served.get("master_listen_fd", -1))
        raise
    return SealedStore(inner, meeting.key)


def join_gloo(
    meeting: Meeting,
    rank: int,
    size: int,
    timeout: timedelta,
    address_of_node: str,
    listening: socket.socket | None = None,
) -> ProcessGroupGloo:
    """A gloo group beside torch's own world, of members that have authenticated each other.

    Raises:
        StrangerError: another process interfered.
    """
    store = open_store(meeting, timeout, listening)
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._devices = [ProcessGroupGloo.create_device(hostname=meeting.own_address(address_of_node))]
    group = ProcessGroupGloo(dist.PrefixStore("group", store), rank, size, options)
    prove_membership(group, meeting.key, rank, size)
    return group


def prove_membership(group: Any, key: bytes, rank: int, size: int) -> None:
    """Make every member prove to every other that it has the key; all members together.

    Raises:
        StrangerError: one of them does not have the key.
    """
    asked = {peer: os.urandom(PROOF_BYTES) for peer in range(size) if peer != rank}
    questions = _exchange(group, asked, _QUESTION)
    proofs = _exchange(group, {peer: _proof(key, rank, peer, question) for peer, question in questions.items()}, _PROOF)
    strangers = [p for p in asked if not hmac.compare_digest(proofs[p], _proof(key, p, rank, asked[p]))]
    if strangers:
        raise StrangerError(
            f"a process that was not handed this group's key answers in the place of rank {strangers[0]}; see "
            "launch/guide/security.md for who should be able to reach these ports"
        )


def _proof(key: bytes, prover: int, asker: int, question: bytes) -> bytes:
    return hmac.digest(key, f"member {prover} to {asker}:".encode() + question, "sha256")


def _exchange(group: Any, messages: Mapping[int, bytes], tag: int) -> dict[int, bytes]:
    """Exchange messages of `PROOF_BYTES` with every peer, one in each direction."""
    outgoing = {peer: _as_tensor(message) for peer, message in messages.items()}
    incoming = {peer: torch.empty(PROOF_BYTES, dtype=torch.uint8) for peer in messages}
    work = [group.send([tensor], peer, tag) for peer, tensor in outgoing.items()]
    work += [group.recv([tensor], peer, tag) for peer, tensor in incoming.items()]
    for each in work:
        each.wait()
    return {peer: bytes(tensor.tolist()) for peer, tensor in incoming.items()}


def _as_tensor(data: bytes) -> Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)


def gather_texts(text: str, device: torch.device) -> list[str]:
    """The texts of every rank of torch's world, in rank order, cut to `TEXT_BYTES`; it replaces `all_gather_object`, which
    unpickles what arrives."""
    data = text.encode()[:TEXT_BYTES]
    own = torch.zeros(TEXT_BYTES, dtype=torch.uint8)
    own[: len(data)] = _as_tensor(data)
    gathered = [torch.empty(TEXT_BYTES, dtype=torch.uint8, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own.to(device))
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in gathered]


def refuse_objects() -> None:
    """From now on no collective of torch in this process unpickles anything, whichever library calls it."""
    distributed_c10d._tensor_to_object = _refuse


def _refuse(*_: object, **__: object) -> NoReturn:
    raise StrangerError(
        "a collective was to unpickle what another process sent, which could be any code: send tensors of a fixed size"
    )
