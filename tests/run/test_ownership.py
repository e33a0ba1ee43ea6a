"""A run's folder has one owner, whatever becomes of its process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from filelock import SoftFileLease

from actors.control.owner import folders_of
from grpo_ray.errors import ConfigError
from grpo_ray.run import ownership
from grpo_ray.run.ownership import FOLDER, Ownership, commanded, describe, forget_dead, holding
from grpo_ray.run.run_dir import RunDir
from launch.pipeline.stages import run_pipeline
from launch.run.jobs import resume_run, start_grpo, start_sample

ROOT = Path(__file__).parents[2]
HOLDS = """
import sys, time
from pathlib import Path
from grpo_ray.errors import ConfigError
from grpo_ray.run.ownership import commanded
while time.time() < float(sys.argv[2]):
    pass
try:
    with commanded(Path(sys.argv[1])):
        print("mine", flush=True)
        sys.stdin.readline()
except ConfigError as e:
    print("refused", e, flush=True)
"""
Hold = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts processes that take a folder's lock at a given time, and keep it until they are told something."""
    started = []

    def start(folder: Path, at: float = 0.0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDS, folder, str(at)],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "LEASE_S", 0.6)
    monkeypatch.setattr(ownership, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr(ownership, "POLL_S", 0.05)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def written_by(folder: Path, monkeypatch: pytest.MonkeyPatch, *, host: str | None = None, boot: int = 0) -> Path:
    """The lock of an owner that nobody touches any more: of another machine, or of another start of this one."""
    path = folder / FOLDER / "command.lock"
    path.parent.mkdir(parents=True)
    start = (boot << 64 | 77) if boot else None
    fields = {"pid": 2**22 + 5, "host": host or ownership._this_machine()[0], "mode": "lease", "token": "ab"}
    fields |= {"duration": repr(ownership.LEASE_S)} | ({"start": start} if start else {})
    path.write_text("filelock/2\n" + "".join(f"{k}={v}\n" for k, v in fields.items()))
    return path


def test_the_second_is_refused_with_the_first_ones_host_process_and_time(tmp_path: Path, hold: Hold) -> None:
    first = hold(tmp_path / "run")
    assert said(first) == "mine\n"
    began = time.monotonic()
    with pytest.raises(ConfigError) as e, commanded(tmp_path / "run"):
        pass
    assert time.monotonic() - began < 3
    text = str(e.value)
    for part in (os.uname().nodename, f"process {first.pid}", time.strftime("since %Y-"), f"kill -INT {first.pid}"):
        assert part in text
    first.communicate("done\n", timeout=20)
    with commanded(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["train", "resume", "sample", "pipeline"])
def test_every_command_that_writes_is_refused_before_anything_is_started(
    command: str, tmp_path: Path, hold: Hold
) -> None:
    run = tmp_path / "run"
    first = hold(run)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1 + 1 =", "answer": "2"}\n' * 8)
    body: dict[str, object] = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": str(tmp_path / "rows.jsonl")}},
        "reward": {"functions": [{"name": "accuracy"}]},
    }
    recipe, named = tmp_path / "recipe.yaml", {"dir": str(tmp_path), "name": "run"}
    recipe.write_text(yaml.safe_dump(body | named))
    stages = tmp_path / "stages.yaml"
    stages.write_text(yaml.safe_dump(named | {"stages": {"only": {"kind": "train", "config": body}}}))
    assert said(first) == "mine\n"
    (run / "config.yaml").write_text(recipe.read_text())
    commands: dict[str, Callable[[], object]] = {
        "train": lambda: start_grpo(str(recipe), []),
        "resume": lambda: resume_run(run),
        "sample": lambda: start_sample(str(recipe), []),
        "pipeline": lambda: run_pipeline(str(stages), [], None, None, dry_run=False),
    }
    with pytest.raises(ConfigError, match=rf"in use: by .*process {first.pid}"):
        commands[command]()
    assert [p.name for p in run.iterdir() if p.name != FOLDER] == ["config.yaml"]


def test_of_many_that_start_at_once_one_gets_it(tmp_path: Path, hold: Hold) -> None:
    at = time.time() + 1.5
    processes = [hold(tmp_path / "run", at) for _ in range(4)]
    words = [said(p).split()[0] for p in processes]
    assert sorted(words) == ["mine"] + ["refused"] * 3


@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_owner_leaves_it_free_at_once_also_one_that_nobody_waits_for(
    tmp_path: Path, hold: Hold, reaped: bool
) -> None:
    first = hold(tmp_path)
    assert said(first) == "mine\n"
    first.send_signal(signal.SIGKILL)
    if reaped:
        first.wait()
    else:
        while Path(f"/proc/{first.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
    began = time.monotonic()
    with commanded(tmp_path):
        assert time.monotonic() - began < 3


def test_a_stopped_owner_keeps_it(tmp_path: Path, hold: Hold) -> None:
    first = hold(tmp_path)
    assert said(first) == "mine\n"
    first.send_signal(signal.SIGSTOP)
    with pytest.raises(ConfigError, match=f"process {first.pid}"), commanded(tmp_path):
        pass
    first.send_signal(signal.SIGCONT)
    first.communicate("\n", timeout=20)


def test_the_number_of_a_dead_owner_may_be_anothers_now(tmp_path: Path) -> None:
    path = tmp_path / FOLDER / "command.lock"
    path.parent.mkdir()
    host, boot = ownership._this_machine()
    # This process, by its number; but one that started at another time.
    record = f"pid={os.getpid()}\nhost={host}\nmode=lease\ntoken=ab\nduration=60.0\nstart={boot << 64 | 1}\n"
    path.write_text(f"filelock/2\n{record}")
    with commanded(tmp_path):
        assert "token=ab\n" not in path.read_text()


@pytest.mark.usefixtures("quick")
def test_one_of_another_machine_is_taken_over_when_nothing_was_heard_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Its clock may be wrong by hours either way.
    for run, offset in ("a", -7200), ("b", 7200):
        path = written_by(tmp_path / run, monkeypatch, host="elsewhere")
        os.utime(path, (time.time() + offset,) * 2)
        began = time.monotonic()
        with commanded(tmp_path / run):
            assert time.monotonic() - began >= ownership.LEASE_S


@pytest.mark.parametrize(("host", "boot"), [("elsewhere", 0), (None, 12345)])
@pytest.mark.usefixtures("quick")
def test_one_of_another_machine_that_is_heard_of_keeps_it_also_under_this_ones_name(
    host: str | None, boot: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written_by(tmp_path, monkeypatch, host=host, boot=boot)
    toucher = subprocess.Popen(["bash", "-c", f"while sleep 0.1; do touch -c {path}; done"])
    try:
        with pytest.raises(ConfigError, match=r"in use: by process 4194309 on "), commanded(tmp_path):
            pass
    finally:
        toucher.kill()
        toucher.wait()
    with commanded(tmp_path):
        pass


@pytest.mark.usefixtures("quick")
def test_what_a_power_cut_left_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / FOLDER).mkdir(parents=True)
    (tmp_path / "a" / FOLDER / "command.lock").touch()
    written_by(tmp_path / "b", monkeypatch, boot=12345)
    for run in "a", "b":
        with commanded(tmp_path / run):
            pass


def test_a_controller_that_outlives_its_command_is_named_with_how_to_end_it(tmp_path: Path) -> None:
    owner = describe("a run of `grpo-ray train`", "`grpo-ray stop x` ends it")
    refused = pytest.raises(ConfigError, match=r"grpo-ray train` on .*`grpo-ray stop x` ends it")
    with holding([tmp_path], owner, print), refused, commanded(tmp_path):
        pass
    with commanded(tmp_path):
        pass


def test_a_controller_whose_command_is_gone_is_waited_for_and_then_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "ENDING_S", 0.4)
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom grpo_ray.run.ownership import describe, holding\n"
        "with holding([Path(sys.argv[1])], describe('a run', 'wait', ends_with_command=True), print):\n"
        "    print('mine', flush=True); time.sleep(600)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], env=env, stdout=subprocess.PIPE, text=True) as run:
        assert said(run) == "mine\n"
        began = time.monotonic()
        with commanded(tmp_path):
            assert time.monotonic() - began > 0.4
        assert not psutil.pid_exists(run.pid)


def test_no_process_ends_itself_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "ENDING_S", 0.4)
    run = Ownership(tmp_path, "run")
    run.take(describe("a run", "wait", ends_with_command=True), print)
    began = time.monotonic()
    with pytest.raises(ConfigError), commanded(tmp_path):
        pass
    assert time.monotonic() - began > 0.4
    run.release()


@pytest.mark.usefixtures("quick")
def test_an_owner_that_was_taken_over_is_told_and_leaves_the_others_lock(tmp_path: Path) -> None:
    told: list[str] = []
    first = Ownership(tmp_path, "run", told.append)
    first.take(describe("the first", "wait"), print)
    path = tmp_path / FOLDER / "run.lock"
    other = path.with_name("other")
    other.write_text(path.read_text().replace("token=", "token=0"))
    other.replace(path)
    deadline = time.monotonic() + 10
    while not told and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "belongs to" in told[0]
    first.release()
    assert path.exists()
    assert path.with_suffix(".json").exists()


@pytest.mark.usefixtures("quick")
def test_a_lock_that_was_removed_by_hand_is_made_again(tmp_path: Path) -> None:
    told: list[str] = []
    run = Ownership(tmp_path, "run", told.append)
    run.take(describe("the first", "wait"), print)
    path = tmp_path / FOLDER / "run.lock"
    path.unlink()
    deadline = time.monotonic() + 10
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists()
    assert told == []
    run.release()
    assert not path.exists()


def test_a_run_holds_its_checkpoints_too_where_they_are_elsewhere(tmp_path: Path) -> None:
    run, store = RunDir(tmp_path / "a" / "x"), tmp_path / "checkpoints"
    assert folders_of(run, "grpo") == [run.path]
    assert folders_of(run.with_checkpoints(str(store)), "sft") == [run.path, store / "x"]
    assert folders_of(run.with_checkpoints("s3://bucket"), "dpo") == [run.path]
    assert folders_of(run, "eval") == folders_of(run, "replay") == []
    me, other = describe("a run", "wait"), RunDir(tmp_path / "b" / "x").with_checkpoints(str(store))
    with (
        holding(folders_of(run.with_checkpoints(str(store)), "grpo"), me, print),
        pytest.raises(ConfigError, match="checkpoints/x is in use"),
        holding(folders_of(other, "grpo"), me, print),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_not_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"can't be written to .*dir="), commanded(tmp_path / "file" / "run"):
        pass


@pytest.mark.usefixtures("quick")
def test_a_folder_that_can_not_be_made_is_not_waited_for() -> None:
    with (
        pytest.raises(ConfigError, match=r"/proc/runs/x can't be written to \(No such file"),
        commanded(Path("/proc/runs/x")),
    ):
        pass


def test_a_lock_is_no_run(tmp_path: Path) -> None:
    with commanded(tmp_path):
        RunDir.create(tmp_path)


def test_filelock_keeps_to_what_is_leant_on(tmp_path: Path) -> None:
    lease = SoftFileLease(tmp_path / "x", thread_local=False)
    with lease:
        owner = SoftFileLease(tmp_path / "x").owner
        assert owner is not None
        assert (owner.pid, owner.mode) == (os.getpid(), "lease")
        assert (owner.start or 0) >> ownership.BOOT_ID_BITS == int(
            Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", ""), 16
        )


RUNS = """
import sys
from pathlib import Path
from grpo_ray.run.ownership import describe, holding
with holding([Path(sys.argv[1])], describe("a run", ""), print):
    print("mine", flush=True)
    sys.stdin.readline()
"""


def test_the_lock_of_a_controller_that_was_ended_goes_with_its_command_and_that_of_a_live_one_stays(
    tmp_path: Path,
) -> None:
    controller = subprocess.Popen(
        [sys.executable, "-c", RUNS, tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert said(controller) == "mine\n"
        forget_dead(tmp_path)
        assert (tmp_path / FOLDER / "run.lock").is_file()
    finally:
        controller.kill()
        controller.communicate()
    forget_dead(tmp_path)
    assert not (tmp_path / FOLDER).exists()
