"""Who writes in a run's folder: one command, and one controller, each until it ends or its process, machine or power does.

RUN/.owner/command.lock    the command that made or opened the run (train, resume, sample, pipeline, ..)
RUN/.owner/run.lock        the controller, which on a cluster outlives the command
RUN/.owner/*.json          beside each: who that is, for the message to the next one

A lock is filelock's `SoftFileLease`: a file made exclusively, which file systems of all kinds can do (flock is local alone on
some, and unknown to others), touched every HEARTBEAT_S. It is taken over at once when its process was on this machine and is gone,
and else when it was not touched for LEASE_S of the clock of the one who waits: clocks of machines are not compared.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import psutil
from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from grpo_ray import json_text
from grpo_ray.errors import ConfigError
from grpo_ray.files import write_whole
from grpo_ray.plain_terminal import say

FOLDER = ".owner"
LEASE_S, HEARTBEAT_S = 60.0, 10.0
"""A lock that is not touched for LEASE_S is left over. It is touched so often that five misses in a row are no death."""
ENDING_S = 20.0
"""How long the controller of a run may take to notice that the command which started it is gone. In a container in which nobody
reaps the dead it never does; it is ended then."""
KILL_S = 5.0
POLL_S = 0.2
NOT_FOUND = 5
"""How often a folder that was just made may be gone again."""
SAYS_S = 2.0
"""A wait that is longer is told."""

Part = Literal["command", "run"]
BOOT_ID_BITS = 64
"""filelock's start of a process holds the machine's boot id above so many bits."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as it describes itself."""

    host: str
    pid: int
    since: str
    command: str
    end: str
    """How to see or end it."""
    ends_with_command: bool = False
    """It is the controller of a run that ends when the command which started it does."""

    def __str__(self) -> str:
        since = f", since {self.since}" if self.since else ""
        return f"{self.command} on {self.host} (process {self.pid}){since}"


class Ownership:
    """One lock that is held. `lost` says why it is not any more."""

    def __init__(self, folder: Path, part: Part, on_lost: Callable[[str], None] | None = None) -> None:
        self.lost: str | None = None
        self._on_lost = on_lost
        self._run = folder
        self._made = [f for f in (folder, *folder.parents) if not f.exists()]
        """Folders that are there for the lock alone, unless something comes into them."""
        self._path = folder.resolve() / FOLDER / f"{part}.lock"
        self._about = self._path.with_suffix(".json")
        self._lease = self._new_lease()
        self._not_found = 0

    def _new_lease(self) -> SoftFileLease:
        return SoftFileLease(
            self._path,
            lease_duration=LEASE_S,
            heartbeat_interval=HEARTBEAT_S,
            on_compromise=self._compromised,
            thread_local=False,
            timeout=0,
        )

    def take(self, owner: Owner, tell: Callable[[str], None]) -> None:
        """
        Args:
            tell: gets one line when that takes a while.

        Raises:
            ConfigError: another has it, and lives; with who that is. Or the folder can't be written.
        """
        try:
            self._take(tell)
            # A file that is empty after a power cut says nothing of whose it was.
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
            write_whole(self._about, json.dumps(asdict(owner)).encode())
        except OSError as e:
            self.release()
            raise ConfigError(
                f"{self._run} can't be written to ({e.strerror or e}); mend that, or choose another folder with dir=..."
            ) from None

    def _take(self, tell: Callable[[str], None]) -> None:
        began, told, ended = time.monotonic(), False, False
        seen, seen_at = _look(self._path), began
        while True:
            now = time.monotonic()
            marker = _look(self._path)
            state = self._state(now - seen_at)
            if marker != seen:
                if state in ("elsewhere", "unclear") and marker[:1] == seen[:1]:
                    raise self._held()
                seen, seen_at = marker, now
            if state == "dead":
                self._break(marker)
            if state != "unclear" and self._acquired():
                return
            if state == "here" and now - began > self._patience():
                if ended or not self._end_left_over():
                    raise self._held()
                ended = True
            if now - began > SAYS_S and not told:
                told = True
                tell(f"{self._run} was taken by {self._holder()}: waiting up to {LEASE_S:g} s for a sign that it lives")
            time.sleep(POLL_S)

    def _acquired(self) -> bool:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lease.acquire()
        except (Timeout, LeaseSettingsMismatch):
            return False
        except FileNotFoundError:
            # The one before has just taken the empty folder away. Or no folder can be made there, as in /proc.
            self._not_found += 1
            if self._not_found > NOT_FOUND:
                raise
            return False
        return True

    def _state(self, unchanged_s: float) -> Literal["free", "here", "elsewhere", "dead", "unclear"]:
        """Of the one who holds it. `free` is also what filelock sees to by itself. `unclear`: it was cut off while it wrote its
        name, or it is of a machine of this name that is another one, or was this one before it started again."""
        record = self._lease.owner
        if record is None:
            return "free" if not self._path.exists() else "dead" if unchanged_s >= LEASE_S else "unclear"
        host, boot = _this_machine()
        if record.hostname != host:
            return "elsewhere"
        if record.start is not None and len({record.start >> BOOT_ID_BITS, boot} - {0}) > 1:
            return "dead" if unchanged_s >= LEASE_S else "unclear"
        try:
            status = psutil.Process(record.pid).status()
        except psutil.NoSuchProcess:
            return "free"
        # Nobody has asked how it ended, as nobody does in many containers.
        return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "here"

    def _break(self, marker: tuple[int, ...]) -> None:
        """Of one that is dead and that filelock takes for alive. Only one process of this machine does that at a time."""
        with self._path.with_suffix(".break").open("w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if _look(self._path) == marker:
                self._lease.force_break()

    def _patience(self) -> float:
        about = self._described()
        return ENDING_S if about is not None and about.ends_with_command else 0.0

    def _end_left_over(self) -> bool:
        """A controller without the command that it belongs to, if that is what it is."""
        about = self._described()
        if about is None or not about.ends_with_command or about.pid == os.getpid():
            return False
        try:
            process = psutil.Process(about.pid)
            process.kill()
            process.wait(KILL_S)
        except psutil.Error:
            return False
        return True

    def _held(self) -> ConfigError:
        about = self._described()
        end = about.end if about is not None else "wait for it"
        return ConfigError(
            f"{self._run} is in use: by {self._holder()}. A run has one owner: {end}, or choose another with name=..."
        )

    def _holder(self) -> str:
        about = self._described()
        if about is not None:
            return str(about)
        record = self._lease.owner
        if record is None:
            return "a process that was cut off"
        return f"process {record.pid} on {record.hostname.partition('?')[0]}"

    def _described(self) -> Owner | None:
        """Only if that is the one who holds it: it writes this a moment later."""
        record = self._lease.owner
        try:
            about = Owner(**json_text.read(self._about.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return about if record is not None and record.pid == about.pid else None

    def _compromised(self, loss: LeaseCompromise) -> None:
        """Called by the heartbeat. What nobody else has taken is taken again: a lock that was removed by hand, or that could not be
        touched while the file system was away."""
        while self._away():
            time.sleep(HEARTBEAT_S)
        with contextlib.suppress(OSError):
            if loss.reason == "refresh-failed" and self._lease.is_lock_held_by_us:
                self._lease.release()
            again = self._new_lease()
            if not self._path.exists() and self._run.is_dir():
                self._path.parent.mkdir(exist_ok=True)
                again.acquire()
                self._lease = again
                return
        what = f"{self._run} belongs to {self._holder()} now" if self._path.exists() else f"{self._run} is gone"
        self.lost = f"{what}; this process was not heard of for a while, and ends without another word in it"
        if self._on_lost is not None:
            self._on_lost(self.lost)

    def _away(self) -> bool:
        try:
            _look(self._path)
        except OSError:
            return True
        return False

    def release(self) -> None:
        """Of one that was lost, nothing of the new owner's is touched."""
        with contextlib.suppress(OSError):
            if self.lost is None and self._lease.is_locked:
                self._about.unlink(missing_ok=True)
                self._path.with_suffix(".break").unlink(missing_ok=True)
            self._lease.release()
            for made in (self._path.parent, *self._made):
                made.rmdir()


@cache
def _this_machine() -> tuple[str, int]:
    """Its name as filelock writes it down, with the container's number in it, and the id of its start; 0 where that is hidden."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "self", thread_local=False):
        record = SoftFileLease(Path(folder) / "self").owner
    assert record is not None
    return record.hostname, (record.start or 0) >> BOOT_ID_BITS


def _look(path: Path) -> tuple[int, ...]:
    """Which file that is, and when it was touched; empty: there is none. It is opened, for NFS asks the server only then."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns


@contextmanager
def commanded(folder: Path, tell: Callable[[str], None] = lambda text: say(text, error=True)) -> Iterator[Ownership]:
    """This command is the only one that writes in `folder`, which need not be there yet.

    Raises:
        ConfigError: another one does, or the controller of one that is gone.
    """
    me = _this_command(folder.name)
    command = Ownership(folder, "command")
    command.take(me, tell)
    try:
        with holding([folder], me, tell):
            pass
        yield command
    finally:
        command.release()


def _this_command(run: str) -> Owner:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word == "job":
        return describe("a run of `grpo-ray submit`", f"`grpo-ray logs {run}` shows it, `grpo-ray stop {run}` ends it")
    end = f"wait for it, or end it with `kill -INT {os.getpid()}` there, after the step under way and with a checkpoint"
    return describe(f"`grpo-ray {word}`", end)


@contextmanager
def holding(
    folders: Iterable[Path],
    owner: Owner,
    tell: Callable[[str], None],
    on_lost: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """This controller is the only one that writes in these folders.

    Args:
        on_lost: called from another thread with the reason, when it is not any more.

    Raises:
        ConfigError: another one does.
    """
    with contextlib.ExitStack() as held:
        for folder in folders:
            run = Ownership(folder, "run", on_lost)
            run.take(owner, tell)
            held.callback(run.release)
        yield


def forget_dead(folder: Path) -> None:
    """Remove the lock of a controller that was ended and could not do so itself; one that lives keeps it."""
    if not (folder / FOLDER).is_dir():
        return
    left = Ownership(folder, "run")
    with contextlib.suppress(ConfigError):
        left.take(describe("the end of a command", ""), lambda text: None)
        left.release()


def describe(command: str, end: str, *, ends_with_command: bool = False) -> Owner:
    """This process as an owner."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return Owner(socket.gethostname(), os.getpid(), since, command, end, ends_with_command)
