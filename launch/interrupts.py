"""What Ctrl-C and SIGTERM do, at every moment of a command: it ends at once, with 130 or 143 and one line on what is left.

The first signal runs the open endings, the innermost first, prints the line of the innermost that has one, and exits
without unwinding: an exception from a signal handler would surface anywhere, inside an import too, where some library turns
it into another error. Little is imported here and nothing that takes time, since the command line begins with this module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from pathlib import Path
    from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
LIMIT_S = 10.0
"""The time limit of endings, in seconds."""
GONE_S = 3.0
"""The wait from the order to kill a process to its end."""
BEFORE = "nothing was begun, and nothing is changed"
_BREAKS = "\n\t"
SHOW_CURSOR = b"\x1b[?25h"


class _Open(NamedTuple):
    line: Callable[[], str] | None
    end: Callable[[], None] | None


_open: list[_Open] = []
_last: list[Callable[[], object]] = []
_owner = 0
"""The process that these endings belong to; a process that it forks does not run them."""


def install() -> None:
    """Install the handlers, also where SIGINT was ignored, as in the background of a script: `kill -INT` is how such a run is
    stopped."""
    global _owner
    _owner = os.getpid()
    for number in SIGNALS:
        signal.signal(number, _on_signal)


@contextlib.contextmanager
def leaving(line: str | Callable[[], str] | None = None, end: Callable[[], None] | None = None) -> Iterator[None]:
    """Set what a signal does while the block is open.

    Args:
        line: what is left and how to go on, computed after the endings. None: the line of the block around it.
        end: ends or removes what must not stay.
    """
    entry = _Open((lambda: line) if isinstance(line, str) else line, end)
    _open.append(entry)
    try:
        yield
    finally:
        _open.remove(entry)


def at_end(call: Callable[[], object]) -> None:
    """Register a call for the end of the command, however it ends."""
    import atexit

    _last.append(call)
    atexit.register(call)


def run_last() -> None:
    """Run the registered calls, for an end at which Python runs nothing by itself."""
    for call in _last:
        with contextlib.suppress(Exception):
            call()


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder that a signal removes too."""
    import shutil
    import tempfile
    from pathlib import Path

    with (
        tempfile.TemporaryDirectory(prefix="grpo-ray-") as name,
        leaving(end=lambda: shutil.rmtree(name, ignore_errors=True)),
    ):
        yield Path(name)


@contextlib.contextmanager
def as_exceptions() -> Iterator[None]:
    """Raise exceptions inside, for code that catches them: KeyboardInterrupt for SIGINT, SystemExit(143) for SIGTERM; a second
    signal ends at once."""

    def on_signal(number: int, _frame: FrameType | None) -> None:
        for each, handler in before.items():
            signal.signal(each, handler)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    before = {number: signal.signal(number, on_signal) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep the handlers of these signals inside: Ray's for SIGTERM ends its process silently, and with another code."""
    setting = signal.signal

    def signal_(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else setting(number, handler)

    signal.signal = signal_  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = setting


def end_now(number: int) -> NoReturn:
    """End this process as a signal does."""
    import threading

    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    code = 128 + number
    name = signal.Signals(number).name
    late = threading.Timer(LIMIT_S, _give_up, (code, name))
    late.daemon = True
    late.start()
    line = BEFORE
    entries = list(reversed(_open))
    for entry in entries:
        if entry.end is not None:
            with contextlib.suppress(Exception):
                entry.end()
    try:
        end_descendants()
    except Exception:
        # The signal came in the middle of an import that this needs.
        _kill_descendants()
    for entry in entries:
        if entry.line is not None:
            try:
                line = entry.line()
            except Exception as e:
                line = f"what is left can't be told ({e})"
            break
    _say(f"{name}: {line}")
    _exit(code)


def end_descendants() -> None:
    """Kill all processes that this one has started, and those that they started; remove their temporary folders."""
    if "psutil" not in sys.modules and not _has_children():
        return
    import shutil
    import tempfile
    import time
    from pathlib import Path

    import psutil

    found = psutil.Process().children(recursive=True)
    for process in found:
        with contextlib.suppress(psutil.Error):
            process.kill()
    give_up = time.monotonic() + GONE_S
    while time.monotonic() < give_up and any(_is_alive(process) for process in found):
        time.sleep(0.02)
    for process in found:
        for folder in Path(tempfile.gettempdir()).glob(f"grpo-ray-*-{process.pid}-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _kill_descendants() -> None:
    """Kill the descendants by the kernel's records alone."""
    for pid in _started_by(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _started_by(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *_started_by(child)]
    return found


def _is_alive(process: Any) -> bool:
    """Whether the process is alive: one that is dead and was not reaped by its parent, which may be dead too, is not."""
    import psutil

    with contextlib.suppress(ChildProcessError):
        os.waitpid(process.pid, os.WNOHANG)
    try:
        return process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return False


def _has_children() -> bool:
    try:
        for task in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{task}/children") as file:
                if file.read().strip():
                    return True
    except OSError:
        return True
    return False


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if os.getpid() != _owner:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    end_now(number)


def _give_up(code: int, name: str) -> None:
    _say(f"{name}: ended before everything was tidied up")
    _exit(code)


def _say(line: str) -> None:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        if os.isatty(1):
            os.write(1, SHOW_CURSOR + b"\n")
        os.write(2, f"{''.join(c for c in line if c.isprintable() or c in _BREAKS)}\n".encode(errors="replace"))


def _exit(code: int) -> NoReturn:
    run_last()
    os._exit(code)
