"""The transfer alone, its two ends in one process: engines are stood for by loaders that note what they are given."""

from __future__ import annotations

import logging
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

from actors.weights.buckets import TRAILER, DigestSource, plan_buckets
from actors.weights.gloo_engine import Inbox
from actors.weights.gloo_group import GlooInitInfo
from actors.weights.gloo_trainer import GlooTrainer, GlooTrainerInitInfo
from actors.weights.memory import Address, map_memory
from actors.weights.protocol import EngineTarget

pytestmark = pytest.mark.timeout(300)
TIMEOUT_S = 10.0
BUCKET_BYTES = 4096
SHAPES = {"embed": (100, 16), "tiny": (3,), "norm": (16,), "proj": (64, 16), "head": (100, 16)}


class Source(WeightSource):
    def __init__(self) -> None:
        self.seed = 0

    def weights(self) -> dict[str, Tensor]:
        # Ranks read their weights side by side in threads, which share torch's own generator.
        generator = torch.Generator().manual_seed(self.seed)
        return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, torch.float32, shape) for name, shape in SHAPES.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights().items())


class Notes:
    """A loader that copies, as slowly as it is told to."""

    def __init__(self) -> None:
        self.delay_s = 0.0
        self.fails = False
        self.given: dict[str, Tensor] = {}
        self.used: dict[str, Tensor] = {}

    def load(self, batches: Any) -> None:
        self.given = {}
        for weights in batches:
            time.sleep(self.delay_s)
            if self.fails:
                raise ValueError("no such layer")
            self.given |= {name: tensor.clone() for name, tensor in weights}

    def swap(self) -> None:
        self.used = self.given


class Client:
    """Engines of this process, of which some can map the sender's memory."""

    def __init__(self, sharing: list[bool]) -> None:
        self.sharing = sharing
        self.targets = [EngineTarget(f"rollout-{i}", 0, None, 1) for i in range(len(sharing))]
        self.loaders = [Notes() for _ in sharing]
        self.inboxes: list[Any] = [None] * len(sharing)
        self.memories: list[Tensor | None] = [None] * len(sharing)
        self.before_stage: Callable[[], None] = lambda: None

    def share(self, address: Address) -> list[EngineTarget]:
        self.memories = [map_memory(address) if shares else None for shares in self.sharing]
        return [t for t, shares in zip(self.targets, self.sharing, strict=True) if shares]

    def are_here(self, targets: list[EngineTarget]) -> bool:
        return True

    def join(self, targets: list[EngineTarget], init_info: dict[str, Any]) -> None:
        def one(place: int, rank: int) -> None:
            info = GlooInitInfo(**init_info)
            plan = plan_buckets(Source().metadata(), info.bucket_bytes)
            memory = self.memories[place] if info.shared else None
            self.inboxes[place] = Inbox(info, rank, self.loaders[place], plan, memory)

        with ThreadPoolExecutor(len(targets)) as pool:
            list(pool.map(one, [self.targets.index(t) for t in targets], range(1, 1 + len(targets))))

    def stage(self) -> None:
        self.before_stage()
        for inbox in self.inboxes:
            inbox.open()

    def wait_staged(self) -> None:
        while sum(inbox.is_full() for inbox in self.inboxes) < len(self.inboxes):
            time.sleep(0.01)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...
    def start_weight_update(self) -> None: ...
    def update_weights(self, update_info: Any) -> None: ...
    def finish_weight_update(self, _weight_version: str | None = None) -> None: ...


class Ends:
    def __init__(self, *sharing: bool) -> None:
        self.source = Source()
        self.client = Client(list(sharing))
        self.trainer = GlooTrainer.trainer_init(
            GlooTrainerInitInfo(BUCKET_BYTES, TIMEOUT_S, rank=0), client=self.client, source=DigestSource(self.source)
        )
        assert [shared for _, shared in self.trainer._groups] == sorted(set(sharing), reverse=True)

    def send(self, seed: int) -> None:
        self.source.seed = seed
        self.trainer.send_weights()

    def swap(self) -> None:
        for inbox in self.client.inboxes:
            inbox.swap(self.trainer.digest_source.digest.hex())

    def assert_used(self, seed: int) -> None:
        self.source.seed = seed
        for loader in self.client.loaders:
            assert loader.used.keys() == SHAPES.keys()
            for name, tensor in self.source.weights().items():
                assert torch.equal(loader.used[name], tensor), name


@pytest.mark.parametrize("sharing", [(True, True), (False, False), (True, False, True, False)])
def test_every_engine_has_the_weights_when_the_sender_says_so(sharing: tuple[bool, ...]) -> None:
    ends = Ends(*sharing)
    for seed in range(4):
        ends.client.loaders[seed % len(sharing)].delay_s = 0.05
        ends.send(seed)
        assert all(inbox.is_full() or inbox._loaded.result(0.5) for inbox in ends.client.inboxes)
        # Not overwritten by what is sent next, and not read after it.
        ends.swap()
        ends.assert_used(seed)


def on_the_way(ends: Ends, meddle: Callable[[Tensor], Tensor]) -> None:
    """What is sent from now on is what `meddle` makes of it."""
    (group, shared) = ends.trainer._groups[0]

    class Way:
        def broadcast(self, tensor: Tensor, root: int) -> Any:
            return group.broadcast(meddle(tensor.clone()), root)

        def __getattr__(self, name: str) -> Any:
            return getattr(group, name)

    ends.trainer._groups = [(Way(), shared)]


def test_an_engine_that_reads_shared_memory_gets_no_weights_by_gloo() -> None:
    ends = Ends(True)
    sent: list[int] = []

    def count(tensor: Tensor) -> Tensor:
        sent.append(tensor.nbytes)
        return tensor

    on_the_way(ends, count)
    ends.send(1)
    ends.swap()
    ends.assert_used(1)
    assert len(sent) > 3
    assert set(sent) == {TRAILER}


def keep_the_sum(bucket: Tensor) -> Tensor:
    """Other weights with the same digest."""
    words = bucket[: len(bucket) - len(bucket) % 8].view(torch.int64)
    words[0] += 5
    words[1] -= 5
    return bucket


def flip_the_digest(bucket: Tensor) -> Tensor:
    bucket[-TRAILER] ^= 1
    return bucket


@pytest.mark.parametrize(
    ("sharing", "forge"), [(False, keep_the_sum), (False, flip_the_digest), (True, flip_the_digest)]
)
def test_what_another_process_forged_on_the_way_is_refused(sharing: bool, forge: Callable[[Tensor], Tensor]) -> None:
    ends = Ends(sharing)
    ends.send(1)
    ends.swap()
    on_the_way(ends, forge)
    with pytest.raises(RuntimeError, match="is not what the sender sealed"):
        ends.send(2)
    ends.assert_used(1)


@pytest.mark.parametrize("sharing", [True, False])
def test_weights_of_an_earlier_transfer_can_not_be_sent_again_nor_in_another_order(sharing: bool) -> None:
    ends = Ends(sharing)
    sent: list[Tensor] = []

    def record(tensor: Tensor) -> Tensor:
        sent.append(tensor)
        return tensor

    on_the_way(ends, record)
    ends.send(1)
    ends.swap()
    number = iter(range(len(sent)))
    on_the_way(ends, lambda tensor: sent[next(number)])
    with pytest.raises(RuntimeError, match="is not what the sender sealed"):
        ends.send(1)
    ends.assert_used(1)


def test_the_ports_of_a_transfer_are_on_loopback_where_all_is_on_one_node() -> None:
    before = listening()
    ends = Ends(True, False)
    assert {host for host, _ in listening() - before} == {"127.0.0.1"}
    ends.send(1)


def listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    return {(c.laddr.ip, c.laddr.port) for c in connections if c.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("sharing", [(True, True), (False, False), (True, False)])
def test_a_bit_that_changed_on_the_way_is_refused_and_what_was_there_stays(
    sharing: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = Ends(*sharing)
    ends.send(1)
    ends.swap()
    fill = GlooTrainer._fill

    def corrupt(trainer: Any, number: int, bucket: Any, *args: Any) -> Tensor:
        flat = fill(trainer, number, bucket, *args)
        if number == 1:
            flat[bucket.slots[-1].start] ^= 1
        return flat

    monkeypatch.setattr(GlooTrainer, "_fill", corrupt)
    with pytest.raises(RuntimeError, match=r"the bucket tiny \.\. norm .* it is refused"):
        ends.send(2)
    with pytest.raises(RuntimeError, match="it is refused"):
        ends.swap()
    ends.assert_used(1)


def test_a_model_that_does_not_take_the_weights_says_why() -> None:
    ends = Ends(True, False)
    ends.client.loaders[1].fails = True
    with pytest.raises(ValueError, match="no such layer"):
        ends.send(1)


def test_what_is_loaded_gets_no_other_version() -> None:
    ends = Ends(True)
    ends.send(1)
    with pytest.raises(RuntimeError, match=r"checksum \w+ is loaded, the sender's is beef"):
        ends.client.inboxes[0].swap("beef")
    ends.swap()
    with pytest.raises(RuntimeError, match="checksum None is loaded"):
        ends.swap()
    ends.assert_used(1)


def test_an_engine_that_never_votes_ends_in_the_group_s_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.actors.weights.test_weight_gloo.TIMEOUT_S", 1.0)
    ends = Ends(True)
    release = threading.Event()
    monkeypatch.setattr(ends.client.loaders[0], "load", lambda batches: release.wait(8))
    monkeypatch.setattr(ends.client, "wait_staged", lambda: None)
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        ends.send(1)
    release.set()


def test_without_memory_to_share_engines_are_sent_the_weights_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (BUCKET_BYTES, limits[1]))
    try:
        with caplog.at_level(logging.WARNING):
            client = Client([True])
            trainer = GlooTrainer.trainer_init(
                GlooTrainerInitInfo(BUCKET_BYTES, TIMEOUT_S, rank=0), client=client, source=DigestSource(Source())
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [shared for _, shared in trainer._groups] == [False]
    (line,) = [r.message for r in caplog.records if r.name == "actors.weights.gloo_trainer"]
    assert "shared memory for weights" in line
    assert "by gloo" in line
    trainer.send_weights()
    client.inboxes[0].swap(trainer.digest_source.digest.hex())
    assert torch.equal(client.loaders[0].used["head"], Source().weights()["head"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_are_sent_in_the_dtype_that_the_engines_were_told(dtype: torch.dtype) -> None:
    """The learner holds fp32."""
    from actors.weights.sender import ZeroWeightSource

    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    source = ZeroWeightSource(module, 1 << 20, dtype)
    sent = dict(source)
    assert list(sent) == [name for name, _ in module.named_parameters()]
    for name, param in module.named_parameters():
        assert sent[name].dtype == dtype, name
        assert torch.equal(sent[name], param.detach().to(dtype)), name
    assert {meta.dtype for meta in source.metadata()} == {dtype}
    assert source.num_bytes() == sum(t.numel() * t.element_size() for t in sent.values())
