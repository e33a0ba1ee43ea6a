"""Ownership of a run's folder: one command and one controller may write to it, until they or their process or machine end.

RUN/.owner/command.lock    the command that made or opened the run (train, resume, sample, pipeline, ..)
RUN/.owner/run.lock        the controller, which on a cluster outlives the command
RUN/.owner/*.json          beside each: a description of the owner, for the message to the next one

A lock is filelock's `SoftFileLease`: a file created exclusively, which file systems of all kinds support (flock is local on some,
and missing on others), and touched every HEARTBEAT_S. It is taken over at once when its process was on this machine and is gone,
and otherwise when it was not touched for LEASE_S by the waiting process's clock: clocks of machines are not compared.
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
"""The time after which an untouched lock is stale, and the interval at which it is touched: five missed heartbeats are
tolerated."""
ENDING_S = 20.0
"""How long the controller of a run may take to notice that the command which started it is gone. In a container without a process
that reaps the dead it never does; then it is killed.
"""
KILL_S = 5.0
POLL_S = 0.2
NOT_FOUND = 5
"""The number of times that a newly created folder may be gone again."""
SAYS_S = 2.0
"""The wait in seconds after which a message is printed."""

Part = Literal["command", "run"]
BOOT_ID_BITS = 64
"""The number of low bits in filelock's process start time; the machine's boot id is above them."""


@dataclass(frozen=True)
class Owner:
    """The holder of a lock, as it describes itself."""

    host: str
    pid: int
    since: str
    command: str
    end: str
    """How to see or end it."""
    ends_with_command: bool = False
    """Whether it is the controller of a run that ends when the command which started it does."""

    def __str__(self) -> str:
        since = f", since {self.since}" if self.since else ""
        return f"{self.command} on {self.host} (process {self.pid}){since}"


class Ownership:
    """A lock that is held. `lost` is the reason why it is not any more."""

    def __init__(self, folder: Path, part: Part, on_lost: Callable[[str], None] | None = None) -> None:
        self.lost: str | None = None
        self._on_lost = on_lost
        self._run = folder
        self._made = [f for f in (folder, *folder.parents) if not f.exists()]
        """Folders that exist for the lock alone, unless something else is created in them."""
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
        """Take the lock.

        Args:
            tell: gets one line when that takes a while.

        Raises:
            ConfigError: another process has it, and lives; the message names it. Or the folder cannot be written.
        """
        try:
            self._take(tell)
            # A file that is empty after a power cut does not reveal its owner.
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
            # The previous owner has just removed the empty folder. Or no folder can be created there, as in /proc.
            self._not_found += 1
            if self._not_found > NOT_FOUND:
                raise
            return False
        return True

    def _state(self, unchanged_s: float) -> Literal["free", "here", "elsewhere", "dead", "unclear"]:
        """The state of the holder. `free` includes what filelock handles by itself. `unclear`: it was interrupted while it wrote
        its name, or it is on a machine of this name that is another one, or was this one before a reboot.
        """
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
        # Nobody has reaped it, as in many containers.
        return "dead" if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD) else "here"

    def _break(self, marker: tuple[int, ...]) -> None:
        """Break the lock of a dead process that filelock takes for alive. Only one process of this machine does so at a time."""
        with self._path.with_suffix(".break").open("w") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            if _look(self._path) == marker:
                self._lease.force_break()

    def _patience(self) -> float:
        about = self._described()
        return ENDING_S if about is not None and about.ends_with_command else 0.0

    def _end_left_over(self) -> bool:
        """Kill a controller that has outlived the command it belongs to, if the holder is one."""
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
        """The holder's description, only if it belongs to the current holder, which writes it a moment after locking."""
        record = self._lease.owner
        try:
            about = Owner(**json_text.read(self._about.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return about if record is not None and record.pid == about.pid else None

    def _compromised(self, loss: LeaseCompromise) -> None:
        """Handle a loss, as the heartbeat calls it. The lock is taken again if nobody else has it: it may have been removed by
        hand, or could not be touched while the file system was unavailable.
        """
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
        """Release the lock; after a loss nothing of the new owner's is touched."""
        with contextlib.suppress(OSError):
            if self.lost is None and self._lease.is_locked:
                self._about.unlink(missing_ok=True)
                self._path.with_suffix(".break").unlink(missing_ok=True)
            self._lease.release()
            for made in (self._path.parent, *self._made):
                made.rmdir()


@cache
def _this_machine() -> tuple[str, int]:
    """The machine's name as filelock writes it, with the container's number, and the id of its boot; 0 where that is hidden."""
    with tempfile.TemporaryDirectory() as folder, SoftFileLease(Path(folder) / "self", thread_local=False):
        record = SoftFileLease(Path(folder) / "self").owner
    assert record is not None
    return record.hostname, (record.start or 0) >> BOOT_ID_BITS


def _look(path: Path) -> tuple[int, ...]:
    """The identity of the file and its time of modification; empty if there is none. It is opened, since NFS asks the server
    only then."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns


@contextmanager
def commanded(folder: Path, tell: Callable[[str], None] = lambda text: say(text, error=True)) -> Iterator[Ownership]:
    """Make this command the only one that writes to `folder`, which need not exist yet.

    Raises:
        ConfigError: another command does, or the controller of one that is gone.
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
    """Make this controller the only one that writes to these folders.

    Args:
        on_lost: called from another thread with the reason, when the lock is lost.

    Raises:
        ConfigError: another controller does.
    """
    with contextlib.ExitStack() as held:
        for folder in folders:
            run = Ownership(folder, "run", on_lost)
            run.take(owner, tell)
            held.callback(run.release)
        yield


def forget_dead(folder: Path) -> None:
    """Remove the lock of a controller that was killed and could not do so itself; a live one keeps it."""
    if not (folder / FOLDER).is_dir():
        return
    left = Ownership(folder, "run")
    with contextlib.suppress(ConfigError):
        left.take(describe("the end of a command", ""), lambda _text: None)
        left.release()


def describe(command: str, end: str, *, ends_with_command: bool = False) -> Owner:
    """A description of this process as an owner."""
    since = time.strftime("%Y-%m-%d %H:%M:%S %Z")
    return Owner(socket.gethostname(), os.getpid(), since, command, end, ends_with_command)
