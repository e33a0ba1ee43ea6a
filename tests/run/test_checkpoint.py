"""Checkpoints are whole or not there, and what is broken is noticed."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from pathlib import Path

import pytest

from grpo_ray.errors import CheckpointError, ConfigError, GrpoRayError
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.manifest import FileSum, first_wrong, from_json, to_json
from grpo_ray.run.run_dir import RunDir
from grpo_ray.run.saver import BACKGROUND, Saver
from grpo_ray.telemetry.events import CheckpointEvent, Event, MessageEvent


class Learner:
    """Two ranks with a few bytes each."""

    def __init__(self) -> None:
        self.held = b""
        self.export = True
        self.fail: BaseException | None = None
        self.may_write = asyncio.Event()
        self.may_write.set()

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        self.export = export

    async def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        held = self.held
        await self.may_write.wait()
        out: dict[str, FileSum] = {}
        for rank in (0, 1):
            with place.filling(f"learner/rank-{rank}") as (folder, sums):
                (folder / "weights").write_bytes(held + b"x" * 100)
                if self.fail is not None:
                    raise self.fail
            out |= sums
        if self.export:
            with place.filling("hf") as (folder, sums):
                (folder / "config.json").write_text(held.decode())
                (folder / "lora").mkdir()
                (folder / "lora" / "adapter.json").write_text("{}")
            out |= sums
        return out


class Run:
    """A run that does nothing but save."""

    def __init__(self, folder: Path, where: str | None = None, keep: int = 2) -> None:
        folder.mkdir(exist_ok=True)
        self.dir = RunDir(folder).with_checkpoints(where)
        self.learner = Learner()
        self.events: list[Event] = []
        self.saver = Saver(self.dir, self.learner, keep=keep, emit=self.events.append)

    async def start(self, step: int, *, export: bool = True) -> None:
        self.learner.held = str(step).encode()
        await self.saver.save(step, {"step": step}, export=export)

    def save(self, *steps: int) -> None:
        async def work() -> None:
            for step in steps:
                await self.start(step)
            await asyncio.wait_for(self.saver.deliver(), 20)

        asyncio.run(work())

    def files(self, step: int) -> list[Path]:
        return sorted(p for p in self.folder(step).rglob("*") if p.is_file())

    def folder(self, step: int) -> Path:
        return Path(self.dir.store.place(step).url.removeprefix("file://"))

    def newest(self) -> tuple[int | None, list[str]]:
        told: list[str] = []
        return self.dir.latest_valid_step(told.append), told


@pytest.fixture(params=["folder", "elsewhere", "fsspec"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Run:
    """`file://` by fsspec stands for the object stores: it gets no rename either."""
    where = {"folder": None, "elsewhere": str(tmp_path / "other"), "fsspec": f"file://{tmp_path}/bucket"}
    return Run(tmp_path / "run", where[request.param])


@pytest.fixture
def local(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_the_newest_checkpoints_are_kept_and_say_what_was_saved(run: Run) -> None:
    run.save(1, 2, 3)
    assert run.dir.steps() == [2, 3]
    assert run.dir.load_state(3) == {"step": 3}
    assert run.newest() == (3, [])
    assert [p.name for p in run.folder(3).parent.iterdir() if p.name != "step-000002"] == ["step-000003"]
    manifest = json.loads((run.folder(3) / "manifest.json").read_text())
    names = {p.relative_to(run.folder(3)).as_posix() for p in run.files(3)} - {"manifest.json"}
    assert set(manifest["files"]) == names
    assert {"learner/rank-1/weights", "hf/lora/adapter.json", "loop/loop.json"} <= names
    with run.dir.store.place(3).reading() as files:
        assert files.local("learner/rank-1/weights").read_bytes() == b"3" + b"x" * 100
        with pytest.raises(CheckpointError, match=r"learner/rank-2/weights can't be read"):
            files.local("learner/rank-2/weights")


def test_the_exported_model_follows_a_local_checkpoint(local: Run) -> None:
    local.save(1, 2, 3)
    assert (local.dir.exported / "config.json").read_text() == "3"


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def number_of_files(tmp_path: Path) -> int:
    run = Run(tmp_path / "count")
    run.save(1)
    return len(run.files(1))


@pytest.mark.parametrize("harm", ["first byte", "middle byte", "last byte", "cut", "longer", "gone"])
def test_harm_to_any_file_is_told_and_the_checkpoint_before_it_is_used(run: Run, tmp_path: Path, harm: str) -> None:
    for number in range(number_of_files(tmp_path)):
        run.save(1, 2)
        path = run.files(2)[number]
        size = path.stat().st_size
        if harm.endswith("byte"):
            flip(path, {"first": 0, "middle": size // 2, "last": size - 1}[harm.split()[0]])
        elif harm == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        elif harm == "longer":
            path.write_bytes(path.read_bytes() + b"x")
        else:
            path.unlink()
        name = path.relative_to(run.folder(2)).as_posix()
        step, told = run.newest()
        if (name, harm) == ("manifest.json", "gone"):
            # As a save that was cut off: no checkpoint, and nothing to tell.
            assert (step, told) == (1, [])
        else:
            assert step == 1, name
            (text,) = told
            assert f"step 2 is broken: {name}" in text
            assert str(run.folder(2)) in text
        assert run.dir.steps() == [1], "the broken one is none any more"
        assert run.newest() == (1, [])
        run.save(2)
        assert run.newest() == (2, []), "and is saved again"


def test_of_several_broken_ones_every_one_is_told(run: Run) -> None:
    run.save(1, 2)
    (run.folder(2) / "hf" / "config.json").write_text("?")
    for path in (run.folder(1) / "learner" / "rank-0" / "weights", run.folder(1) / "loop" / "loop.json"):
        flip(path, 0)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* is whole \(steps 1, 2\)"):
        run.newest()
    assert run.dir.steps() == [1, 2], "they are left as they are"


def test_checkpoints_of_an_earlier_version_are_told_with_the_way_on(local: Run) -> None:
    old = local.folder(40)
    (old / "learner" / "deepspeed").mkdir(parents=True)
    (old / "learner" / "learner.json").write_text("{}")
    (old / "loop.json").write_text("{}")
    assert local.dir.steps() == []
    with pytest.raises(CheckpointError, match=r"DeepSpeed's, .* model\.path=.*step-000040/hf"):
        local.newest()
    assert Run(local.dir.path.with_name("other")).newest() == (None, [])


def test_a_manifest_that_was_not_written_for_this_step_says_what_it_is() -> None:
    x, y = "0" * 64, "f" * 64
    sums = {"b": FileSum(1, x), "a": FileSum(2, y)}
    data = to_json(3, sums)
    content = {"format": 1, "step": 3, "files": {"a": {"size": 2, "sha256": y}, "b": {"size": 1, "sha256": x}}}
    assert data.decode() == json.dumps(content, indent=1)
    assert from_json(data, 3) == sums
    for other, told in (
        (content | {"format": 2}, "is of format 2, this is grpo-ray's format 1"),
        (content | {"step": 4}, "is of step 4"),
        (content | {"files": {}}, "names no files"),
        (content | {"files": []}, "is not what was written (AttributeError: 'list' object has no attribute 'items')"),
        ({"format": 1, "step": 3}, "is not what was written (KeyError: 'files')"),
        ([], "is not what was written (TypeError: list indices must be integers or slices, not str)"),
    ):
        with pytest.raises(ValueError, match=r"is|names") as e:
            from_json(json.dumps(other).encode(), 3)
        assert str(e.value) == told


def test_what_is_wrong_with_a_file_is_told_of_the_first_one() -> None:
    written = {name: FileSum(3, "f" * 64) for name in ("whole", "gone", "short", "other")}
    now = {"whole": FileSum(3, "f" * 64), "short": FileSum(2, "f" * 64), "other": FileSum(3, "e" * 64)}

    def sum_now(name: str) -> FileSum:
        if name not in now:
            raise OSError("it is away")
        return now[name]

    told = {
        "gone": "gone can't be read (it is away)",
        "short": "short has 2 bytes instead of 3",
        "other": "other is damaged: its SHA-256 is eeeeeeeeeeee.., and was ffffffffffff.. when it was written",
    }
    assert first_wrong({"whole": written["whole"]}, sum_now) is None
    for name, text in told.items():
        assert first_wrong({n: written[n] for n in ("whole", name)}, sum_now) == text
    assert first_wrong(written, sum_now) == told["gone"]


def test_what_is_told_of_checkpoints_and_runs_that_can_not_be_used(local: Run, tmp_path: Path) -> None:
    local.save(1, 2)
    (local.folder(2) / "hf" / "config.json").write_text("?2")
    place = local.folder(2)
    step, told = local.newest()
    assert step == 1
    assert told == [
        f"the checkpoint of step 2 is broken: hf/config.json has 2 bytes instead of 1, in {place}; using the one before it"
    ]
    (local.folder(1) / "hf" / "config.json").unlink()
    with pytest.raises(CheckpointError) as e:
        local.newest()
    assert str(e.value) == (
        f"none of the checkpoints in {local.dir.store.url} is whole (steps 1); put one back from a copy, or start a new run, "
        "e.g. from the newest exported model with model.path="
    )
    state = local.folder(1) / "loop" / "loop.json"
    state.write_text("[]")
    with pytest.raises(CheckpointError, match=r"loop/loop\.json: expected a mapping, got list$"):
        local.dir.load_state(1)
    state.write_text("{")
    with pytest.raises(
        CheckpointError, match=r"loop/loop\.json can't be read \(not valid JSON: Expecting property name"
    ):
        local.dir.load_state(1)
    for name, text in (
        (
            "pipeline.json",
            "is a pipeline, not a run: `grpo-ray pipeline RECIPE`, as it was begun, goes on; its stages are runs",
        ),
        ("other.json", "is not a run: it has no config.yaml"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(ConfigError) as refused:
            RunDir.open(folder)
        assert str(refused.value) == f"{folder} {text}"
        with pytest.raises(ConfigError) as refused:
            RunDir.create(folder)
        assert str(refused.value) == (
            f"run {folder} exists already; continue it with `grpo-ray resume {folder}` (on a cluster "
            f"`grpo-ray submit --resume {folder.name}`), or choose another with name=..."
        )
    (tmp_path / "begun" / RunDir.LOGS).mkdir(parents=True)
    assert RunDir.create(tmp_path / "begun").path == tmp_path / "begun"
    (tmp_path / "file").touch()
    assert RunDir.is_taken(tmp_path / "file")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("rank 1 died")])
def test_a_save_that_fails_leaves_the_one_before_it_and_no_trace_and_is_an_error_of_the_next(
    run: Run, error: BaseException
) -> None:
    async def work() -> None:
        await run.start(1)
        await run.saver.finish()
        run.learner.fail = error
        await run.start(2)
        while not any(isinstance(e, MessageEvent) for e in run.events):
            await asyncio.sleep(0.001)
        run.learner.fail = None
        with pytest.raises(GrpoRayError, match=str(error.args[-1])) as e:
            await run.start(3)
        assert "GB free" in str(e.value)
        assert "step 2" in str(e.value)

    asyncio.run(asyncio.wait_for(work(), 20))
    assert run.dir.steps() == [1]
    assert run.newest() == (1, [])
    assert sorted(p.name for p in run.folder(1).parent.iterdir()) == ["step-000001"]


def test_what_is_told_of_a_failed_write_names_the_room_where_there_is_a_folder(local: Run) -> None:
    folder = Path(local.dir.outbox.url)
    shutil.rmtree(folder, ignore_errors=True)
    text = f"the checkpoint of step 7 could not be written to {folder}"
    assert str(local.saver._failure(7, OSError("full"))) == f"{text}: full"
    folder.mkdir(parents=True)
    told = str(local.saver._failure(7, OSError("full")))
    assert told.startswith(f"{text} (")
    assert told.endswith(f" GB free in {folder}): full")
    free = float(told.removeprefix(f"{text} (").split()[0])
    assert free == pytest.approx(shutil.disk_usage(folder).free / 1e9, rel=0.2)


def test_a_save_may_be_discarded_twice(local: Run) -> None:
    place = local.dir.store.begin(5)
    assert Path(place.url).is_dir()
    for _ in range(2):
        local.dir.store.discard(place)
        assert not Path(place.url).exists()


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_one_waits(run: Run) -> None:
    async def work() -> None:
        run.learner.may_write.clear()
        await asyncio.wait_for(run.start(1), 10)
        assert run.dir.steps() == []
        assert run.saver.take_metrics() == {}
        second = asyncio.create_task(run.start(2))
        await asyncio.sleep(0.05)
        assert not second.done()
        run.learner.may_write.set()
        await second
        assert 0.05 <= run.saver.take_metrics()[BACKGROUND] < 5
        await run.saver.deliver()

    asyncio.run(asyncio.wait_for(work(), 20))
    arrived = [e.step for e in run.events if isinstance(e, CheckpointEvent)]
    # A store gets the newest; the first may be there before.
    assert arrived == [1, 2] or (run.dir.store.is_remote and arrived == [2])
    for step in arrived:
        with run.dir.store.place(step).reading() as files:
            assert files.local("hf/config.json").read_text() == str(step), "what was held at the time"


def test_what_cut_off_saves_have_left_is_removed_by_the_next(run: Run) -> None:
    run.save(1)
    place = run.dir.outbox.begin(2)
    with place.filling("learner/rank-0") as (folder, _):
        (folder / "weights").write_bytes(b"half")
    assert run.newest() == (1, [])
    run.save(3)
    assert sorted(p.name for p in run.folder(1).parent.iterdir()) == ["step-000001", "step-000003"]


def test_runs_of_different_names_share_a_checkpoint_path(tmp_path: Path) -> None:
    one, two = (Run(tmp_path / name, f"file://{tmp_path}/bucket/") for name in ("a", "b"))
    one.save(1)
    two.save(2)
    assert (one.newest(), two.newest()) == ((1, []), (2, []))
    shutil.rmtree(tmp_path / "bucket" / "a")
    assert one.newest() == (None, [])


def test_a_protocol_that_is_not_installed_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint\.path nosuch://.*install"):
        Run(tmp_path / "run", "nosuch://bucket").newest()


def test_a_run_is_never_overwritten_but_logs_of_a_failed_start_are_no_run(tmp_path: Path) -> None:
    path = tmp_path / "r"
    (path / "logs").mkdir(parents=True)
    RunDir.create(path)
    (path / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="grpo-ray resume"):
        RunDir.create(path)
