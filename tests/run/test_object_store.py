"""Checkpoints in S3, with its real client against a server that speaks it: refused, away for a moment, away for too long, slow."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_ray import object_store
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import CheckpointError, StoreAwayError, StoreError
from grpo_ray.object_store import check_store
from grpo_ray.run import delivery
from grpo_ray.run.checkpoint_store import SET_ASIDE, CheckpointLocation, Store
from grpo_ray.run.ended import finished, write_ended
from grpo_ray.run.manifest import FileSum
from grpo_ray.run.run_dir import RunDir
from grpo_ray.run.saver import Saver
from grpo_ray.telemetry.events import CheckpointEvent, Event, MessageEvent
from tests.loop.test_train_loop import Company, Session, config
from tests.recipes import run_config
from tests.s3 import S3, forget_clients

FILES = {"learner/rank-0/weights", "hf/config.json", "loop/loop.json"}


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    server = S3()
    server.start()
    forget_clients()
    yield server
    server.stop()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> S3:
    server.start()
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)
    for module in (delivery, object_store):
        monkeypatch.setattr(module, "FIRST_WAIT_S", 0.05)
    server.make_bucket(bucket_of(request))
    return server


@pytest.fixture
def bucket(s3: S3, request: pytest.FixtureRequest) -> str:
    return f"s3://{bucket_of(request)}/runs"


def bucket_of(request: pytest.FixtureRequest) -> str:
    """Tests see nothing of each other's."""
    return f"b-{abs(hash(request.node.name))}"


class Learner:
    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        self.place = place

    async def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        out: dict[str, FileSum] = {}
        for part, name in (("learner/rank-0", "weights"), ("hf", "config.json")):
            with place.filling(part) as (folder, sums):
                (folder / name).write_bytes(b"x" * 1000)
            out |= sums
        return out


class Run:
    def __init__(self, folder: Path, where: str, store_s: float = 60.0, keep: int = 2) -> None:
        folder.mkdir(exist_ok=True)
        self.dir = RunDir(folder).with_checkpoints(where, 0.1)
        self.events: list[Event] = []
        self.saver = Saver(self.dir, Learner(), keep=keep, emit=self.events.append, store_s=store_s)

    async def save(self, *steps: int) -> None:
        for step in steps:
            await self.saver.save(step, {"step": step}, export=True)
            await self.saver.finish()

    def told(self, level: str) -> list[str]:
        return [e.text for e in self.events if isinstance(e, MessageEvent) and e.level == level]

    @property
    def arrived(self) -> list[int]:
        return [e.step for e in self.events if isinstance(e, CheckpointEvent)]

    def newest(self) -> tuple[int | None, list[str]]:
        told: list[str] = []
        return self.dir.latest_valid_step(told.append), told


def within(seconds: float, work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, seconds))


def test_checkpoints_are_made_in_the_runs_folder_and_are_in_the_store_alone_at_the_end(
    bucket: str, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", bucket)

    async def work() -> None:
        await run.save(1, 2, 3)
        assert run.dir.outbox.steps()[-1] == 3, "the newest stays while the run goes on"
        await run.saver.deliver()

    within(30, work())
    assert run.dir.store.steps()[-1] == 3
    assert len(run.dir.store.steps()) <= 2
    assert run.newest() == (3, [])
    assert run.dir.load_state(3) == {"step": 3}
    assert run.arrived[-1] == 3
    assert list(run.dir.path.iterdir()) == []
    with run.dir.place(3).reading() as files:
        assert files.local("learner/rank-0/weights").read_bytes() == b"x" * 1000
        with pytest.raises(CheckpointError, match=r"nothing can't be read"):
            files.local("nothing")


def test_while_the_store_is_away_training_goes_on_and_what_waits_is_the_newest_alone(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", bucket)

    async def work() -> None:
        await run.save(1)
        while run.arrived != [1]:
            await asyncio.sleep(0.01)
        s3.stop()
        began = time.monotonic()
        await run.save(2)
        while not run.told("warning"):
            await asyncio.sleep(0.01)
        await run.save(3, 4, 5)
        assert time.monotonic() - began < 15, "no save waits for the store"
        assert run.dir.outbox.steps()[-1] == 5
        assert len(run.dir.outbox.steps()) <= 2
        assert not run.saver.gave_up
        s3.start()
        await run.saver.deliver()

    within(60, work())
    (warning,) = run.told("warning")
    for part in ("step 2", "EndpointConnectionError", "deadlines.store_s", str(run.dir.outbox.url)):
        assert part in warning
    assert "\n" not in warning
    assert any("answers again" in text for text in run.told("info"))
    assert run.dir.store.steps()[-1] == 5
    assert run.newest() == (5, [])
    assert run.dir.outbox.steps() == []


def test_a_store_that_is_away_for_too_long_ends_the_run_with_a_checkpoint_that_a_resumed_one_sends(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    before = Run(tmp_path / "run", bucket)

    async def at_first() -> None:
        await before.save(1)
        await before.saver.deliver()

    within(30, at_first())
    run = Run(tmp_path / "run", bucket, store_s=0.5)

    async def cut_off() -> None:
        s3.stop()
        await run.save(2)
        while not run.saver.gave_up:
            await asyncio.sleep(0.01)
        await run.save(3)
        with pytest.raises(StoreError) as e:
            await run.saver.deliver()
        for part in (
            "0.5 s (deadlines.store_s)",
            "step 3 is in",
            run.dir.outbox.url,
            f"grpo-ray resume {run.dir.path}",
        ):
            assert part in str(e.value)
        await run.saver.close()

    within(60, cut_off())
    assert run.dir.outbox.steps() == [3]
    step, (told,) = run.newest()
    assert step == 3
    assert "did not answer" in told
    s3.start()
    assert run.newest() == (3, []), "though the store's newest is older"
    assert run.dir.store.steps() == [1]
    again = Run(run.dir.path, bucket)

    async def resumed() -> None:
        again.saver.send_leftovers()
        await again.saver.deliver()

    within(30, resumed())
    assert run.dir.store.steps() == [1, 3]
    assert run.dir.outbox.steps() == []


def test_what_is_asked_is_tried_until_the_time_that_was_told_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(object_store.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(object_store.time, "sleep", lambda s: now.__setitem__(0, now[0] + s))
    tried: list[float] = []

    def call(fs: Any) -> None:
        tried.append(now[0])
        raise OSError("away")

    with pytest.raises(StoreAwayError, match="did not answer for 60 s"):
        object_store.ask("memory://x", "list", call, patience_s=60, tell=lambda text: None)
    assert tried == [0, 1, 3, 7, 15, 31, 60]


def test_no_store_is_given_up_for_the_length_of_the_next_wait(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "FIRST_WAIT_S", 1000.0)
    run = Run(tmp_path / "run", bucket, store_s=60)

    async def work() -> None:
        s3.stop()
        await run.save(1)
        while not run.told("warning"):
            await asyncio.sleep(0.01)
        assert not run.saver.gave_up
        await run.saver.close()

    within(30, work())


def delivery_of(folder: Path, *steps: int) -> tuple[delivery.Delivery, list[Event]]:
    """Into a store in memory, with these checkpoints in its outbox."""
    outbox, events = Store(str(folder)), list[Event]()
    for step in steps:
        place = outbox.begin(step)
        with place.filling("loop") as (inside, sums):
            (inside / "loop.json").write_text("{}")
        outbox.commit(place, step, sums, keep=9)
    store = Store(f"memory://{folder.name}")
    return delivery.Delivery(outbox, store, keep=2, limit_s=5, emit=events.append), events


def test_what_is_told_of_a_store_that_does_not_take_a_checkpoint(tmp_path: Path) -> None:
    out, events = delivery_of(tmp_path, 3)
    url, place = "memory://" + tmp_path.name, tmp_path / "step-000003"
    waits = MessageEvent(
        "warning",
        f"the checkpoint of step 3 can't be sent: it is full. It is in {place} and is sent when that works again; "
        "training goes on meanwhile, for deadlines.store_s (5 s) at most",
    )
    for left_s in (2.0, 0.5):
        assert out._is_worth_waiting(CheckpointError("it is full"), 3, heard_at=1.0, left_s=left_s)
        assert (events, out.gave_up, out._away_since) == ([waits], None, 1.0)
    assert not out._is_worth_waiting(CheckpointError("it is full"), 3, heard_at=1.0, left_s=0.0)
    assert out.gave_up == f"checkpoints could not be sent to {url} for 5 s (deadlines.store_s): it is full"
    ends = "; the run ends after this step, with a checkpoint in its folder"
    assert events[1:] == [MessageEvent("warning", out.gave_up + ends)]
    assert not out._is_worth_waiting(OSError(5, "Input/output error"), 4, heard_at=1.0, left_s=2.0)
    assert (
        out.gave_up == f"the checkpoint of step 4 is gone from {tmp_path / 'step-000004'} before it was sent to {url}"
    )
    assert events[2:] == [MessageEvent("warning", out.gave_up + ends)]


def test_what_is_told_of_a_checkpoint_that_has_arrived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery.time, "monotonic", lambda: 16.0)
    out, events = delivery_of(tmp_path, 3, 4)
    url = "memory://" + tmp_path.name
    out._waiting, out._away_since, out._clutter = 4, 10.0, "older ones were not removed"
    out._began = {3: 4.0}
    out._arrived(3)
    assert events == [
        MessageEvent("info", f"{url} answers again after 6 s; the checkpoint of step 3 is there"),
        MessageEvent("warning", "older ones were not removed"),
        CheckpointEvent(3, f"{url}/step-000003", 12.0),
    ]
    assert (out._waiting, out._away_since, out._began) == (4, None, {})
    assert out._outbox.steps() == [4], "what was overtaken is not kept"
    out._arrived(4)
    assert events[3:] == [CheckpointEvent(4, f"{url}/step-000004", 0.0)]
    assert (out._waiting, out._outbox.steps()) == (None, [4])


def test_what_is_told_of_a_checkpoint_that_is_overtaken(tmp_path: Path) -> None:
    out, events = delivery_of(tmp_path, 1, 2, 3)
    out.gave_up = "so that nothing is sent"
    out._sent_step = 1
    out.offer(1)
    out.offer(2)
    assert events == []
    out.offer(3)
    text = f"the checkpoint of step 2 is not sent to memory://{tmp_path.name}: that of step 3 is newer"
    assert events == [MessageEvent("info", text)]
    assert out._outbox.steps() == [1, 3], "what is being sent stays"
    out._away_since = 1.0
    out.offer(4)
    assert len(events) == 1, "while a store is away that is no news"
    out.offer(4)
    assert len(events) == 1


def ended_of(run: Run, status: str) -> RunConfig:
    config = run_config("num_steps=2")
    write_ended(run.dir.path, config, status, "", 2, 2)
    return config


def test_a_run_is_not_finished_while_its_last_checkpoint_is_not_in_the_store(bucket: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", bucket)
    within(30, run.save(2))
    config = ended_of(run, "failed")
    assert finished(run.dir, config) is None
    (run.dir.path / "ended.json").unlink()
    assert finished(run.dir, config) is None, "killed before it was sent"
    again = Run(run.dir.path, bucket)

    async def resumed() -> None:
        again.saver.send_leftovers()
        await again.saver.deliver()

    within(30, resumed())
    assert finished(run.dir, config) is not None


def test_a_finished_run_is_known_for_one_though_its_store_is_away(s3: S3, bucket: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", bucket)

    async def work() -> None:
        await run.save(2)
        await run.saver.deliver()

    within(30, work())
    config = ended_of(run, "finished")
    s3.stop()
    found = finished(run.dir, config)
    assert found is not None
    assert (found.status, found.step) == ("finished", 2)
    assert finished(run.dir, run_config("num_steps=3")) is None


def trained_once(session: Session, steps: int) -> None:
    """Three prompts a step, and none twice or left out."""
    trained = [(row[0], row[3]) for row in session.ledger_rows if row[2] == "trained"]
    assert [step for _, step in trained] == [step for step in range(1, steps + 1) for _ in range(3)]
    assert len({prompt for prompt, _ in trained}) == 3 * steps


def test_a_run_trains_on_while_its_store_is_away_and_ends_with_everything_there(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    settings = [f"checkpoint.path={bucket}", "checkpoint.every_steps=2", "num_steps=40"]
    session = Session(tmp_path / "run", config(*settings))
    session.world.on_update = lambda step: {3: s3.stop, 30: s3.start}.get(step, bool)()
    assert session.go() == "finished"
    trained_once(session, 40)
    assert session.run_dir.store.steps()[-1] == 40
    assert session.run_dir.outbox.steps() == []
    assert "learner/state.json" in str(session.run_dir.store.place(40).read("manifest.json"))


def test_a_run_whose_store_stays_away_ends_after_a_step_and_the_resumed_one_repeats_none(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    settings = [f"checkpoint.path={bucket}", "checkpoint.every_steps=2", "deadlines.store_s=0.5"]
    session = Session(tmp_path / "run", config(*settings, "num_steps=100000"))
    session.world.on_update = lambda step: s3.stop() if step == 3 else None
    with pytest.raises(StoreError, match=r"0\.5 s \(deadlines\.store_s\).*grpo-ray resume"):
        session.go()
    done = session.loop.step
    assert done > 3
    assert session.run_dir.outbox.steps() == [done]
    s3.start()
    again = Session(tmp_path / "run", config(f"checkpoint.path={bucket}", f"num_steps={done + 2}"))
    assert again.go() == "finished"
    trained_once(again, done + 2)
    assert again.run_dir.store.steps()[-1] == done + 2


def test_a_run_waits_no_longer_for_its_store_when_its_learners_have_been_changed(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    settings = [f"checkpoint.path={bucket}", "checkpoint.every_steps=2", "deadlines.store_s=0.5"]
    session = Session(tmp_path / "run", config(*settings, "num_steps=100000"))
    company = Company(session, {2})
    session.loop.roles = replace(session.loop.roles, scaler=company)
    session.world.on_update = lambda step: s3.stop() if step == 3 else None
    with pytest.raises(StoreError, match=r"0\.5 s \(deadlines\.store_s\).*grpo-ray resume"):
        session.go()
    assert [step for step, _, _ in company.changed] == [2]
    assert session.run_dir.outbox.steps() == [session.loop.step]


def test_a_run_whose_store_went_away_before_its_end_is_resumed_to_send_its_last_checkpoint(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    settings = [f"checkpoint.path={bucket}", "num_steps=4"]
    session = Session(tmp_path / "run", config(*settings, "deadlines.store_s=0.5"))
    session.world.on_update = lambda step: s3.stop() if step == 3 else None
    with pytest.raises(StoreError, match="step 4 is in"):
        session.go()
    write_ended(session.run_dir.path, config(*settings), "failed", "away", 4, 4)
    assert finished(session.run_dir, config(*settings)) is None
    s3.start()
    again = Session(tmp_path / "run", config(*settings))
    assert again.go() == "finished"
    trained_once(again, 4)
    assert again.run_dir.store.steps()[-1] == 4
    assert again.run_dir.outbox.steps() == []


def test_a_whole_checkpoint_is_not_taken_for_a_broken_one_when_the_store_does_not_answer(
    s3: S3, bucket: str, tmp_path: Path
) -> None:
    run = Run(tmp_path / "run", bucket)

    async def work() -> None:
        await run.save(1)
        await run.saver.deliver()

    within(30, work())
    s3.stop()
    for ask in (run.newest, run.dir.steps, lambda: run.dir.store.first_wrong(1), lambda: run.dir.load_state(1)):
        with pytest.raises(StoreAwayError, match=r"s3://.* did not answer for 0.1 s.*EndpointConnectionError") as e:
            ask()
        assert "\n" not in str(e.value)
    assert run.dir.has_some()
    s3.start()
    assert run.newest() == (1, [])


def test_a_flipped_bit_in_the_store_is_told_and_the_one_before_is_used(bucket: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", bucket)

    async def work() -> None:
        for step in (1, 2):
            await run.save(step)
            while step not in run.arrived:
                await asyncio.sleep(0.01)
        await run.saver.deliver()

    within(30, work())
    place = run.dir.store.place(2)
    object_store.filesystem(place.url).pipe_file(place.path("hf/config.json"), b"y" + b"x" * 999)
    step, (told,) = run.newest()
    assert step == 1
    assert "hf/config.json is damaged" in told
    assert run.dir.store.steps() == [1]
    assert object_store.filesystem(place.url).exists(place.path(SET_ASIDE))


def test_what_was_half_sent_is_no_checkpoint_and_is_removed_by_the_next(bucket: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", bucket)

    async def work(step: int) -> None:
        await run.save(step)
        await run.saver.deliver()

    within(30, work(1))
    outbox = Store(str(tmp_path / "other"))
    with (place := outbox.begin(2)).filling("odd") as (folder, sums):
        for name in "abc":
            (folder / name).write_text(name)
    outbox.commit(place, 2, sums, keep=None)
    sent: set[str] = set()

    def beat() -> None:
        if len(sent) == 2:
            raise CheckpointError("killed")

    with pytest.raises(CheckpointError, match="killed"):
        run.dir.store.send(outbox.place(2), 2, sent, beat=beat)
    assert run.newest() == (1, [])
    within(30, work(3))
    assert run.dir.store.steps() == [1, 3]
    assert object_store.filesystem(bucket).glob(f"{run.dir.store.url}/step-000002*") == []


def test_of_a_slow_store_only_the_newest_waits_and_the_folder_holds_no_more_than_two(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "run", bucket, keep=9)
    may_go, put = threading.Event(), Store._put

    def slowly(self: Store, *args: Any) -> None:
        assert may_go.wait(20)
        put(self, *args)

    monkeypatch.setattr(Store, "_put", slowly)

    async def work() -> None:
        await run.save(1)
        await asyncio.sleep(0.2)
        for step in (2, 3, 4):
            await run.save(step)
            assert run.dir.outbox.steps() == [1, step]
        may_go.set()
        await run.saver.deliver()

    within(30, work())
    assert run.dir.store.steps() == [1, 4]
    assert [text[:23] for text in run.told("info")] == [
        "the checkpoint of step 2"[:23],
        "the checkpoint of step 3"[:23],
    ]
    assert run.told("warning") == []


def test_a_bucket_that_is_not_there_is_refused_at_once_and_is_not_made(s3: S3) -> None:
    began = time.monotonic()
    with pytest.raises(
        StoreError, match=r"checkpoint\.path s3://no-such-bucket/x: .*bucket does not exist; make the bucket"
    ):
        check_store("s3://no-such-bucket/x", 60)
    with pytest.raises(StoreError, match="bucket does not exist"):
        Store("s3://no-such-bucket/x", 60).steps()
    assert time.monotonic() - began < 10
    assert "no-such-bucket" not in s3.buckets()


def test_keys_that_are_not_known_are_refused_at_once(s3: S3, bucket: str) -> None:
    s3.count_as_strangers(0)
    try:
        began = time.monotonic()
        with pytest.raises(StoreError, match=r"can't write in s3://.*permissions") as e:
            check_store(bucket, 60)
        assert not isinstance(e.value, StoreAwayError)
        assert time.monotonic() - began < 10
    finally:
        s3.count_as_strangers(None)
    check_store(bucket, 60)
    assert object_store.filesystem(bucket).glob(f"{bucket}/*") == []


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (PermissionError("Access Denied"), True),
        (OSError(28, "No space left on device"), True),
        (ConnectionResetError("reset"), False),
        (TimeoutError(), False),
        (OSError(5, "Please reduce your request rate. (SlowDown)"), False),
        (OSError(5, "InternalError"), False),
    ],
)
def test_what_would_be_refused_again_is_told_from_an_outage(error: Exception, refused: bool) -> None:
    assert object_store.is_refusal(error) is refused
