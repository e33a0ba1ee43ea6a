"""A real Slurm of two nodes on this machine: munge, its controller and two of its daemons, with everything in a scratch folder.

A run that is cut off by its time goes on by itself; one that is ended stays ended; nothing of the token is left.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.end_to_end.runs import ROOT, metrics, write_recipe

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
MISSING = [tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"no Slurm here (Debian: slurm-wlm, munge): {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="Slurm's daemons have to be root to run jobs"),
]
SCRIPT = ROOT / "launch" / "slurm" / "grpo_ray.sbatch"
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=off
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


class Slurm:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_"))} | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT),
        }

    def start(self) -> None:
        munge = self.folder / "munge"
        munge.mkdir(mode=0o700)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = munge / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        ports = [free_port() for _ in range(3)]
        conf = CONF.format(folder=self.folder, host=socket.gethostname(), ports=ports)
        (self.folder / "slurm.conf").write_text(conf)
        self.call(
            "munged",
            f"--key-file={key}",
            *(f"--{name}={munge / name}" for name in ("socket", "pid-file", "log-file", "seed-file")),
            "--force",
        )
        self.call("slurmctld", "-c", "-L", str(self.folder / "slurmctld.log"))
        for node in ("n1", "n2"):
            self.call("slurmd", "-N", node, "-L", str(self.folder / f"{node}.log"))
        self.until(lambda: self.call("sinfo", "-h", "-p", "main", "-o", "%T %D").split() == ["idle", "2"], 60)

    def stop(self) -> None:
        """What was started here, by its number; their jobs first, whose processes would stay."""
        with suppress(AssertionError, subprocess.SubprocessError):
            self.cancel_all()
        for name in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge/pid-file"):
            path = self.folder / name
            if path.is_file():
                subprocess.run(["kill", path.read_text().strip()], check=False, capture_output=True)

    def cancel_all(self) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.env, timeout=60, check=False)
        self.until(lambda: not self.call("squeue", "--noheader").strip(), 120)

    def call(self, *command: str, cwd: Path | None = None) -> str:
        done = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def state(self, job: str) -> str:
        """Empty: it is forgotten."""
        done = subprocess.run(
            ["scontrol", "show", "job", "-o", job],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        fields = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
        return f"{fields.get('JobState', '')} {fields.get('ExitCode', '')} {fields.get('Restarts', '')}".strip()

    @staticmethod
    def until(true: Callable[[], bool], seconds: float, say: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, say()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp", ignore_cleanup_errors=True) as folder:
        cluster = Slurm(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(autouse=True)
def no_job_is_left(slurm: Slurm) -> Iterator[None]:
    yield
    slurm.cancel_all()


class Job:
    def __init__(self, slurm: Slurm, folder: Path, *options: str) -> None:
        self.slurm, self.folder, self.run_dir = slurm, folder, folder / "runs" / "mine"
        # Ray's sockets are below it: short.
        self.tmp = Path(tempfile.mkdtemp(prefix="s", dir=slurm.folder))
        slurm.env |= {"GRPO_RAY_PORT": str(free_port()), "GRPO_RAY_ROOT": str(ROOT), "TMPDIR": str(self.tmp)}
        recipe = write_recipe(folder)
        words = [
            "train",
            str(recipe),
            f"dir={folder}/runs",
            "name=mine",
            "num_steps=5000",
            "checkpoint.every_steps=1000",
        ]
        command = ["sbatch", "--parsable", "--nodes=2", *options, str(SCRIPT), *words, "deadlines.resources_s=120"]
        self.id = slurm.call(*command, cwd=folder).strip()

    @property
    def log(self) -> str:
        path = self.folder / f"grpo-ray-{self.id}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self) -> list[int]:
        path = self.run_dir / "metrics.jsonl"
        return [int(line["step"]) for line in metrics(self.run_dir)] if path.exists() else []

    def until(self, true: Callable[[], bool], seconds: float = 240) -> None:
        self.slurm.until(true, seconds, lambda: f"{self.slurm.state(self.id)}\n{self.log}")

    def wait_for_requeue(self) -> None:
        """It is in the queue at first, too."""
        self.until(lambda: bool(self.steps()))
        self.until(lambda: self.slurm.state(self.id).startswith("PENDING"), 400)

    def start_again(self) -> None:
        """Without the two minutes that Slurm lets a job wait that came back."""
        self.slurm.call("scontrol", "update", f"JobId={self.id}", "StartTime=now")
        self.until(lambda: self.slurm.state(self.id).startswith("RUNNING"))

    def end_by_hand(self) -> str:
        """Gracefully; its last state."""
        self.slurm.call("scancel", "--signal=USR1", "--batch", self.id)
        self.until(lambda: not self.slurm.state(self.id).startswith(("RUNNING", "COMPLETING")))
        return self.slurm.state(self.id)


def assert_nothing_lost(job: Job, cut_at: int) -> None:
    """Each step once, in order, over both lives; and the first ended with a checkpoint of its last step."""
    steps = job.steps()
    assert steps == list(range(1, len(steps) + 1)), job.log
    assert len(steps) > cut_at > 0
    assert f"after step {cut_at}" in job.log
    assert not (job.run_dir / "superseded").exists()
    assert [p for p in job.tmp.iterdir() if p.name.startswith("grpo-ray.")] == [], "the token"


def test_a_run_ends_with_a_checkpoint_before_its_time_is_up_and_goes_on_by_requeue(
    slurm: Slurm, tmp_path: Path
) -> None:
    job = Job(slurm, tmp_path, "--time=8", "--signal=B:TERM@240")
    job.wait_for_requeue()
    first = job.steps()
    assert first, job.log
    assert (job.run_dir / "checkpoints" / f"step-{first[-1]:06d}" / "manifest.json").is_file()
    job.start_again()
    job.until(lambda: len(job.steps()) > len(first))
    state = job.end_by_hand()
    assert state.startswith("FAILED 143:0 1"), state
    assert_nothing_lost(job, first[-1])


def test_a_preempted_run_makes_room_with_a_checkpoint_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--time=30", "--signal=B:TERM@60")
    job.until(lambda: len(job.steps()) > 1)
    urgent = slurm.call(
        "sbatch",
        "--parsable",
        "--partition=urgent",
        "--nodes=2",
        "--exclusive",
        "--wrap=true",
        "--output=/dev/null",
        cwd=tmp_path,
    ).strip()
    job.wait_for_requeue()
    first = job.steps()
    job.until(lambda: not slurm.state(urgent).startswith(("PENDING", "RUNNING")))
    job.start_again()
    job.until(lambda: len(job.steps()) > len(first))
    job.end_by_hand()
    assert_nothing_lost(job, first[-1])


def test_scancel_leaves_neither_a_token_nor_a_process_nor_a_requeue(slurm: Slurm, tmp_path: Path) -> None:
    job = Job(slurm, tmp_path, "--time=30")
    job.until(lambda: len(job.steps()) > 0)
    assert len([p for p in job.tmp.rglob("token") if p.stat().st_mode & 0o777 == 0o600]) == 2, "one on each node"
    slurm.call("scancel", job.id)
    job.until(lambda: slurm.state(job.id).startswith("CANCELLED"))
    job.until(lambda: not any(p.name.startswith("grpo-ray.") for p in job.tmp.iterdir()), 30)
    assert [p.name for p in tmp_path.iterdir() if "token" in p.name] == []
    ours = subprocess.run(["pgrep", "-f", str(job.run_dir.parent)], capture_output=True, text=True, check=False).stdout
    assert ours.split() == []
