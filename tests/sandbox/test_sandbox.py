"""Whatever a program does, it is contained and scored in time, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward
from grpo_ray.rewards.table import resolve
from grpo_ray.sandbox import isolation
from grpo_ray.types import RewardScore, ScoreStatus
from tests.hostile import CONTAINED, DECEIVING, PUNISHED, TRY, WHY

LIMITS = {"timeout_s": 8.0, "cpu_s": 2, "memory_mb": 400}
SHORT = {**LIMITS, "timeout_s": 1.5, "cpu_s": 1}
"""Of those that would take all of it."""
SLACK_S = 120.0
"""Starting and ending a sandbox takes 0.1 s, on a busy machine seconds."""
ANSWER = f"ANSWER-{os.urandom(16).hex()}"
# A number that no interpreter holds by chance.
CALL = {"inputs": [[1234]], "outputs": [[1522756]], "fn_name": "f"}
ASSERTS = [
    "import math\nassert all([f(1234) == 1522756])",
    "assert math.isclose(f(1234), 1522756)",
    "assert abs(f(1234) - 1522756) < 1e-6",
]


@dataclass(frozen=True)
class Host:
    """What a program may not reach."""

    port: int
    abstract: str
    file: Path
    process: psutil.Process

    def at(self, program: str) -> str:
        words = {
            "HOST_PORT": self.port,
            "HOST_SOCKET": self.abstract,
            "HOST_FILE": self.file,
            "HOST_PID": self.process.pid,
        }
        for word, value in words.items():
            program = program.replace(word, str(value))
        return TRY + program


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    os.environ["HOSTILE_SECRET"] = "in the environment"
    file = Path.home() / f".grpo-ray-hostile-{os.getpid()}"
    file.write_text("a secret")
    name = f"grpo-ray-hostile-{os.getpid()}"
    sleeper = subprocess.Popen(["sleep", "3600"])
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(f"\0{name}")
        unix.listen()
        try:
            yield Host(server.getsockname()[1], name, file, psutil.Process(sleeper.pid))
        finally:
            file.unlink()
            sleeper.kill()
            sleeper.wait()
            del os.environ["HOSTILE_SECRET"]


@pytest.fixture(scope="module")
def code() -> RewardFunction:
    return resolve(RewardFunctionConfig(name="code", args=LIMITS))


@pytest.fixture(scope="module")
def brief() -> RewardFunction:
    return resolve(RewardFunctionConfig(name="code", args=SHORT))


def score(code: RewardFunction, program: str, tests: Any) -> RewardScore:
    """In time, or it fails; with nothing left behind, or it fails."""
    before = in_other_namespaces()
    descriptors = len(os.listdir("/proc/self/fd"))
    started = time.monotonic()
    inputs = ScoreInputs(["p"], [f"It is so.\n```python\n{program}\n```\n"], [[1]], {"tests": [tests]})
    (result,) = call_reward(code, inputs)
    assert time.monotonic() - started < code.args["timeout_s"] + SLACK_S
    assert in_other_namespaces() <= before
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 3, "the event loop's own are three"
    return result


def in_other_namespaces() -> set[int]:
    """Every living process of the sandboxes of this process and those below it, and of sandboxes that nobody owns any more."""
    found = set()
    for process in psutil.process_iter():
        try:
            if in_another_namespace(process.pid) and process.status() != psutil.STATUS_ZOMBIE and is_ours(process):
                found.add(process.pid)
        except (OSError, psutil.Error):
            continue
    return found


def in_another_namespace(pid: int) -> bool:
    return os.stat(f"/proc/{pid}/ns/pid").st_ino != os.stat("/proc/self/ns/pid").st_ino


def is_ours(process: psutil.Process) -> bool:
    """Whether the first process above a sandbox's is this one, one below it, or one to which orphans fall."""
    above = [p for p in process.parents() if p.pid == 1 or not (in_another_namespace(p.pid) or p.name() == "bwrap")]
    return os.getpid() in [p.pid for p in above] or above[0].pid in [p.pid for p in psutil.Process().parents()]


@pytest.mark.parametrize("name", CONTAINED)
def test_what_a_program_attacks_refuses_it(host: Host, code: RewardFunction, name: str) -> None:
    stdin = "7\n" * (4 << 20 if name == "does not read its input" else 1)
    result = score(code, host.at(CONTAINED[name]), [{"input": stdin, "output": "49"}])
    assert (result.status, result.value) == (ScoreStatus.OK, 1.0), result.detail
    untouched(host)


@pytest.mark.parametrize("name", PUNISHED)
def test_a_program_that_does_not_answer_is_wrong_and_says_why(
    host: Host, code: RewardFunction, brief: RewardFunction, name: str
) -> None:
    expected = ANSWER if name == "looks for the answers" else "49"
    result = score(code if name in WHY else brief, host.at(PUNISHED[name]), [{"input": "7", "output": expected}])
    assert (result.status, result.value) == (ScoreStatus.OK, 0.0), result.detail
    assert WHY.get(name, "") in result.detail
    assert result.detail
    untouched(host)


def untouched(host: Host) -> None:
    assert host.process.is_running()
    assert host.process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED)
    assert host.file.read_text() == "a secret"
    marks = [p for p in ("/", "/usr", "/tmp", "/dev", "/dev/shm", str(Path.home())) if Path(p, "hostile-mark").exists()]
    assert marks == []


@pytest.mark.parametrize("name", DECEIVING)
def test_a_function_cannot_make_its_tests_pass_without_the_answer(brief: RewardFunction, name: str) -> None:
    program = TRY + DECEIVING[name]
    called = score(brief, program, CALL)
    assert (called.status, called.value) == (ScoreStatus.OK, 0.0), called.detail
    for test in ASSERTS:
        asserted = score(brief, program, [test])
        assert (asserted.status, asserted.value) == (ScoreStatus.OK, 0.0), (test, asserted.detail)


def test_the_tests_of_this_file_can_fail(host: Host, code: RewardFunction) -> None:
    """The right function passes what the deceiving ones are asked, and outside the sandbox the attacks succeed."""
    right = "def f(x): return x * x"
    assert score(code, right, CALL).value == 1.0
    assert score(code, right, ASSERTS).value == 1.0
    reach = (
        "a connection to a server of the host",
        "an abstract socket of the host",
        "the environment",
        "a file in the home of the host",
        "processes of the host",
        "a shell",
        "a server of its own",
        "System V memory",
        "memory in a memory file",
        "/sys",
    )
    for name in reach:
        done = subprocess.run(
            [sys.executable, "-c", host.at(CONTAINED[name])],
            input="7",
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert "49" not in done.stdout.split(), name


def test_a_killed_scorer_takes_its_sandboxes_with_it(tmp_path: Path) -> None:
    script = tmp_path / "scorer.py"
    script.write_text(
        "from grpo_ray.config.reward import RewardFunctionConfig\n"
        "from grpo_ray.rewards.functions.function import ScoreInputs\n"
        "from grpo_ray.rewards.functions.scoring import call_reward\n"
        "from grpo_ray.rewards.table import resolve\n"
        "f = resolve(RewardFunctionConfig(name='code'))\n"
        "print('ready', flush=True)\n"
        "call_reward(f, ScoreInputs(['p'], ['```python\\nimport time; time.sleep(600)\\n```'], [[1]], "
        "{'tests': [[{'input': '', 'output': ''}]]}))\n"
    )
    before = in_other_namespaces()
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env) as scorer:
        assert scorer.stdout is not None
        assert scorer.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while len(in_other_namespaces() - before) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(in_other_namespaces() - before) >= 2
        scorer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while in_other_namespaces() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert in_other_namespaces() - before == set()


# ---- it fails closed


def test_without_bubblewrap_nothing_runs_and_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "PATH", "/nowhere")
    monkeypatch.setattr(isolation.shutil, "which", lambda *a, **k: None)
    with pytest.raises(RewardError, match=r"bwrap is not installed.*apt-get install bubblewrap"):
        resolve(RewardFunctionConfig(name="code"))


@pytest.mark.parametrize(
    ("old", "new", "trouble"),
    [
        ("--unshare-all", "--unshare-uts --unshare-pid --unshare-ipc", "sees the network interfaces"),
        ("--proc /proc", "--ro-bind /proc /proc", "sees the processes|its own trial"),
        ("--clearenv", "--setenv LEAK 1", "has the environment LEAK"),
        ("--remount-ro /", "", "writes to the root"),
        ("--remount-ro /dev", "", "writes to /dev"),
        ("--disable-userns", "--bogus", "Unknown option --bogus"),
        ("--ro-bind /etc/ld.so.cache /etc/ld.so.cache", "--ro-bind /etc /etc", "sees /etc/passwd"),
        ("--dev /dev", "--dev-bind /sys /sys --dev /dev", "sees /sys/kernel"),
        ("--seccomp", "--sync-fd", "opens a socket.*System V"),
    ],
)
def test_a_cage_with_a_hole_is_refused(monkeypatch: pytest.MonkeyPatch, old: str, new: str, trouble: str) -> None:
    whole = isolation.command

    def holed(*args: Any, **kwargs: Any) -> tuple[list[str], tuple[int, ...]]:
        parts, fds = whole(*args, **kwargs)
        words = old.split()
        at = next(i for i in range(len(parts)) if parts[i : i + len(words)] == words)
        return parts[:at] + new.split() + parts[at + len(words) :], fds

    monkeypatch.setattr("grpo_ray.sandbox.box.command", holed)
    with pytest.raises(RewardError, match=trouble):
        resolve(RewardFunctionConfig(name="code"))
