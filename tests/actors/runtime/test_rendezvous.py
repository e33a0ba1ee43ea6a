"""Groups of processes with strangers at their ports: the attacks are those that once ran code in a learner."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo

from actors.rendezvous import (
    TEXT_BYTES,
    Meeting,
    SealedStore,
    StrangerError,
    gather_texts,
    join_gloo,
    listen_at,
    new_key,
    open_store,
    prove_membership,
    refuse_objects,
)
from actors.runtime import LOOPBACK
from tests.strangers import elsewhere

pytestmark = pytest.mark.timeout(120)
SHORT = timedelta(seconds=10)


class Canary:
    """Who unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path(self.path),)


def meeting() -> tuple[Meeting, Any]:
    listening = listen_at(LOOPBACK)
    return Meeting(LOOPBACK, listening.getsockname()[1], new_key()), listening


def client(where: Meeting) -> dist.TCPStore:
    """Of anybody who can reach the port."""
    return dist.TCPStore(where.host, where.port, is_master=False, wait_for_workers=False, timeout=SHORT)


def test_what_a_stranger_writes_into_the_store_is_refused_and_what_members_wrote_can_not_be_read_there() -> None:
    where, listening = meeting()
    store = open_store(where, SHORT, listening)
    secret = secrets.token_hex(32)
    store.set("id", secret)
    store.set("address", "10.0.0.1")
    store.set("other", "10.0.0.2")

    def meddle() -> str:
        theirs = client(where)
        theirs.set("address", b"6.6.6.6")  # type: ignore[arg-type]
        theirs.set("short", "x")
        theirs.set("moved", theirs.get("other"))  # type: ignore[arg-type]
        return theirs.get("id").hex()

    told = elsewhere(meddle)()
    assert len(told) > len(secret)
    assert store.get("id") == secret.encode()
    assert secret.encode().hex() not in told
    for name in ("address", "short", "moved"):
        with pytest.raises(StrangerError, match=f"under '{name}' what no member"):
            store.get(name)
    assert store.get("other") == b"10.0.0.2"
    member = open_store(where, SHORT)
    assert member.get("id") == store.clone().get("id") == secret.encode()
    assert where.key.hex() not in repr(where)
    assert str(where.key) not in repr(where)


def test_a_port_is_on_the_address_that_is_named_and_on_no_other() -> None:
    where, listening = meeting()
    store = open_store(where, SHORT, listening)
    own = {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.Process().net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == where.port
    }
    assert own == {(LOOPBACK, where.port)}
    assert store.num_keys() >= 0
    assert where.own_address("10.0.0.1") == LOOPBACK
    assert Meeting("10.0.0.2", 1, b"").own_address("10.0.0.1") == "10.0.0.1"


def test_members_form_a_group_and_a_stranger_with_their_store_is_no_member() -> None:
    where, listening = meeting()
    with ThreadPoolExecutor(3) as pool:
        groups = list(
            pool.map(lambda r: join_gloo(where, r, 3, SHORT, LOOPBACK, listening if r == 0 else None), range(3))
        )
        sums = [torch.tensor([rank]) for rank in range(3)]
        list(pool.map(lambda rank: groups[rank].allreduce([sums[rank]]).wait(), range(3)))  # type: ignore[attr-defined]
    assert [int(each) for each in sums] == [3, 3, 3]


@pytest.mark.parametrize("sealed", [True, False])
def test_a_stranger_who_joins_as_a_rank_is_refused_before_anything_of_theirs_is_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sealed: bool
) -> None:
    """Without seals the attack succeeds, so that it is one."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    where, listening = meeting()
    server = open_store(where, SHORT, listening)
    canary = tmp_path / "canary"

    def join_and_gather(rank: int, store: dist.Store, thing: object) -> str:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=SHORT)
        dist.all_gather_object([None, None], thing)
        return "gathered"

    member = elsewhere(lambda: join_and_gather(0, open_store(where, SHORT) if sealed else client(where), "a name"))
    stranger = elsewhere(lambda: join_and_gather(1, client(where), Canary(canary)))
    assert member() == ("StrangerError" if sealed else "gathered")
    stranger()
    assert server.num_keys() > 0
    assert canary.exists() is not sealed


@pytest.mark.parametrize("size", [2, 3])
def test_who_has_not_the_key_is_found_out_once_the_sockets_are_connected(size: int) -> None:
    """The store is open here: a stranger has got hold of a member's socket."""
    store = dist.HashStore()
    key, other = new_key(), new_key()

    def join(rank: int) -> str:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = SHORT
        options._devices = [ProcessGroupGloo.create_device(hostname=LOOPBACK)]
        group = ProcessGroupGloo(dist.PrefixStore("open", store), rank, size, options)
        prove_membership(group, key, rank, size)
        try:
            prove_membership(group, other if rank == size - 1 else key, rank, size)
        except StrangerError as e:
            return str(e)
        return ""

    with ThreadPoolExecutor(size) as pool:
        told = list(pool.map(join, range(size)))
    assert all(f"in the place of rank {size - 1}" in each for each in told[:-1])
    assert "in the place of rank 0" in told[-1]


def test_ranks_tell_each_other_texts_and_unpickle_nothing_whichever_library_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    thing = Canary(tmp_path / "canary")
    long = "é" * TEXT_BYTES

    def rank(own: int) -> str:
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=own, world_size=2, timeout=SHORT)
        refuse_objects()
        refused = 0
        for collective in (
            lambda: dist.all_gather_object([None, None], thing),
            lambda: dist.scatter_object_list([None], [thing, thing], src=0),
            lambda: dist.broadcast_object_list([thing], src=0),
        ):
            try:
                collective()
            except StrangerError:
                refused += 1
        texts = gather_texts(f"sample {own} é", torch.device("cpu"))
        cut = gather_texts(long, torch.device("cpu"))
        return f"{refused} refused, {texts}, {cut == [long[: TEXT_BYTES // 2]] * 2}"

    told = [answer() for answer in [elsewhere(partial(rank, 0)), elsewhere(partial(rank, 1))]]
    # Who broadcasts has nothing to unpickle.
    assert told == [f"{n} refused, ['sample 0 é', 'sample 1 é'], True" for n in (2, 3)]
    assert not (tmp_path / "canary").exists()


def test_a_counter_in_the_store_counts_for_all(tmp_path: Path) -> None:
    store = SealedStore(dist.FileStore(str(tmp_path / "store"), 1), new_key())
    assert [store.add("n", 2), store.add("n", 3)] == [2, 5]
    store.set("a", "b")
    assert store.check(["a"])
    assert not store.check(["c"])
    store.wait(["a"], SHORT)
    assert store.delete_key("a")
    assert not store.check(["a"])
