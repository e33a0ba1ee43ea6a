"""One sandbox, from its start to its end. Requests go in and outcomes come out over a pipe; nothing about what comes out is trusted
but its length."""

from __future__ import annotations

import asyncio
import contextlib
import json
import marshal
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpo_ray.errors import RewardError
from grpo_ray.sandbox.inside import HEADER_BYTES, MAX_STDERR_BYTES
from grpo_ray.sandbox.isolation import MEND, Languages, command, interpreter, last_line, syscall_filter
from grpo_ray.sandbox.watch import GoneError, UnmeasuredError, excess

START_S = 60.0
"""The deadline for a sandbox's first response; a busy machine needs seconds."""
END_S = 60.0
"""The deadline for the end of a killed sandbox."""
WATCH_S = 0.1
OPEN_FILES = 64
INSIDE = Path(__file__).with_name("inside.py").read_text()
REMOTE = Path(__file__).with_name("remote.py").read_text()
WORKER = Path(__file__).with_name("worker.py").read_text()


class BoxEnded(Exception):
    """The program ended its sandbox, or caused its end; says how. The fault is the program's, never the machine's."""


@dataclass(frozen=True)
class Limits:
    """The limits of a sandbox; the package's docstring lists what enforces each."""

    timeout_s: float = 8.0
    cpu_s: int = 4
    memory_mb: int = 512
    processes: int = 16
    file_mb: int = 16
    disk_mb: int = 64
    watch_s: float = WATCH_S
    """The seconds between two measurements of what no limit of a process bounds."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of one request."""

    code: int
    """The exit code of its process; -N: killed by signal N."""
    output: bytes
    """The standard output, or the result of a call."""
    trouble: str
    """The last line of standard error, "" if there is none."""
    cpu_s: float
    """The CPU time of its process and the children that it waited for."""


class Box:
    """A sandbox: `async with await Box.start(..) as box`, then one request at a time. At the end of the block everything in it is
    dead.

    Every request raises:
        BoxEnded: the sandbox has ended.
        TimeoutError: `timeout_s` have passed since the first request.
        UnmeasuredError: its contents can't be measured any more, so it was ended.
    """

    def __init__(self, process: asyncio.subprocess.Process, limits: Limits) -> None:
        self._process = process
        self._first_pid = 0
        self._first = -1
        """The namespace's first process, by a descriptor."""
        self._limits = limits
        self._deadline = 0.0
        """The deadline, counted from the first request: a program should not pay for the start of its sandbox."""
        self._end = ""
        """The reason for which the watch has ended it."""

    @classmethod
    async def start(
        cls,
        source: str,
        limits: Limits,
        languages: Languages,
        *,
        file: str = "",
        imports: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> Box:
        """A sandbox that holds this program, also in `file` if it is named. The modules that it `imports` are loaded for all of its
        requests.

        Raises:
            RewardError: it can't be started.
        """
        rules = syscall_filter()
        filter_fd = os.memfd_create("seccomp")
        info_read, info_fd = os.pipe()
        try:
            os.write(filter_fd, rules)
            os.lseek(filter_fd, 0, os.SEEK_SET)
            arguments, fds = command(languages, filter_fd=filter_fd, info_fd=info_fd, disk_bytes=limits.disk_mb << 20)
            process = await asyncio.create_subprocess_exec(
                *arguments,
                *(interpreter(), "-I", "-S", "-B", "-X", "utf8", "-c", INSIDE),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(*fds, *pass_fds),
                env={},
            )
        except BaseException:
            os.close(info_read)
            raise
        finally:
            os.close(filter_fd)
            os.close(info_fd)
        box = cls(process, limits)
        try:
            await box._await_start(info_read)
            setup = {
                "limits": {
                    "RLIMIT_NPROC": limits.processes + 1,  # the first is ours
                    "RLIMIT_NOFILE": OPEN_FILES,
                    "RLIMIT_AS": limits.memory_mb << 20,
                    "RLIMIT_FSIZE": limits.file_mb << 20,
                    "RLIMIT_CORE": 0,
                    "RLIMIT_MSGQUEUE": 0,
                    "RLIMIT_MEMLOCK": 0,
                    "RLIMIT_SIGPENDING": 256,
                },
                "fds": list(pass_fds),
                "source": source,
                "file": file,
                "imports": list(imports),
                "python_path": list(languages.python_path),
                "remote": REMOTE if pass_fds else "",
            }
            await box._send(setup)
        except BaseException:
            await box.close()
            raise
        finally:
            os.close(info_read)
        return box

    async def __aenter__(self) -> Box:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def script(self, stdin: bytes) -> Outcome:
        """The outcome of the Python program with this input."""
        return await self._request(kind="script", stdin=stdin)

    async def command(self, argv: Sequence[str], stdin: bytes) -> Outcome:
        """The outcome of any other program."""
        return await self._request(kind="command", argv=list(argv), stdin=stdin)

    async def call(self, function: str, args: Any) -> Outcome:
        """The outcome of one function of the Python program; JSON in and out."""
        return await self._request(kind="call", function=function, args=json.dumps(args))

    async def serve(self, fd: int) -> Outcome:
        """Let tests at the other end of `fd` use the Python program."""
        return await self._request(kind="serve", fd=fd)

    async def judge(self, fd: int, tests: Sequence[tuple[str, list[str]]], *, every: bool) -> Outcome:
        """Run tests, each with the names that it takes from the program at the other end of `fd`; the output has one character for
        each, see `remote.judge`."""
        return await self._request(kind="judge", fd=fd, tests=list(tests), all=every)

    async def verify(self, fd: int, item_s: int) -> Outcome:
        """Let the process at the other end of `fd` call the program's `verify` indefinitely; see `verifier`."""
        return await self._request(kind="verify", worker=WORKER, fd=fd, item_s=item_s)

    async def close(self) -> None:
        """Kill the namespace's first process and wait for its end: it comes after that of all others in it.

        Raises:
            RewardError: it does not end.
        """
        try:
            async with asyncio.timeout(END_S):
                await self._end_all()
        except TimeoutError:
            raise RewardError(
                f"a sandbox that was killed has not ended within {END_S:g} s; see process {self._first_pid}"
            ) from None

    async def _end_all(self) -> None:
        self._kill()
        if self._first >= 0:
            gone = asyncio.Event()
            loop = asyncio.get_running_loop()
            loop.add_reader(self._first, gone.set)
            try:
                await gone.wait()
            finally:
                loop.remove_reader(self._first)
                os.close(self._first)
                self._first = -1
        elif self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        await self._process.wait()
        # Reading stops if nobody reads, and so misses the end: a pipe that a program filled would stay open.
        self._process._transport.close()  # type: ignore[attr-defined]

    async def _await_start(self, info: int) -> None:
        try:
            async with asyncio.timeout(START_S):
                first = await self._receive()
        except (BoxEnded, TimeoutError) as e:
            late = isinstance(e, TimeoutError)
            if late:
                self._process.kill()
            assert self._process.stderr is not None
            words = (await self._process.stderr.read()).decode(errors="replace").splitlines()
            why = f"it said nothing within {START_S:g} s" if late else last_line(words) or "it ended in silence"
            raise RewardError(f"no sandbox can be started: {why}. {MEND}") from None
        if first != b"started":
            raise RewardError(f"no sandbox can be started: it said {first[:80]!r}. {MEND}")
        self._first_pid = int(json.loads(os.read(info, 1 << 12))["child-pid"])
        try:
            self._first = os.pidfd_open(self._first_pid)
        except ProcessLookupError:
            raise RewardError(f"no sandbox can be started: its first process is gone. {MEND}") from None

    def _kill(self) -> None:
        if self._first >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._first, signal.SIGKILL)

    async def _request(self, **request: Any) -> Outcome:
        whole = {"stdin": b"", "cpu_s": self._limits.cpu_s, **request}
        self._deadline = self._deadline or time.monotonic() + self._limits.timeout_s
        watch = asyncio.create_task(self._watch())
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                await self._send(whole)
                body = await self._receive()
        except BoxEnded:
            if watch.done():
                watch.result()
            raise
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
        return _outcome(body)

    async def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        body = marshal.dumps(message)
        try:
            self._process.stdin.write(len(body).to_bytes(HEADER_BYTES, "little") + body)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            raise BoxEnded(self._end or "it ended its sandbox") from None

    async def _receive(self) -> bytes:
        assert self._process.stdout is not None
        try:
            size = int.from_bytes(await self._process.stdout.readexactly(HEADER_BYTES), "little")
            if size > (self._limits.file_mb << 20) + (1 << 16):
                raise BoxEnded("it wrote into the sandbox's own pipe")
            return await self._process.stdout.readexactly(size)
        except (asyncio.IncompleteReadError, ConnectionResetError):
            raise BoxEnded(self._end or "it ended its sandbox") from None

    @property
    def _root(self) -> str:
        return f"/proc/{self._first_pid}/root"

    async def _watch(self) -> None:
        """Raises UnmeasuredError once the sandbox is dead."""
        while not self._end:
            await asyncio.sleep(self._limits.watch_s)
            try:
                self._end = excess(f"/proc/{self._first_pid}/root", self._limits.memory_mb)
            except GoneError:
                break
            except UnmeasuredError:
                self._kill()
                raise
        self._kill()


def _outcome(body: bytes) -> Outcome:
    """The outcome from `code seconds length`, a new line, the output, standard error; never a pickle, as a program may have written
    it."""
    head, _, rest = body.partition(b"\n")
    try:
        code, seconds, length = head[:100].split(b" ")
        size = int(length)
        trouble = last_line(rest[size:][-MAX_STDERR_BYTES:].decode(errors="replace").splitlines())
        return Outcome(int(code), rest[:size], trouble, float(seconds))
    except ValueError:
        raise BoxEnded("it wrote into the sandbox's own pipe") from None
