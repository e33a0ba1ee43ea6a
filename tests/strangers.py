"""Other processes, and another user of the machine, for tests that are root's."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

NOBODY = 65534
IS_ROOT = os.getuid() == 0


def as_nobody(attempt: Callable[[], object]) -> str:
    """See `elsewhere`; as the user nobody, who could not start an interpreter that lies in root's home."""

    def become_nobody() -> object:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        os.umask(0)
        os.chdir("/")
        return attempt()

    return elsewhere(become_nobody)()


def elsewhere(attempt: Callable[[], object]) -> Callable[[], str]:
    """Begins it in another process, a fork of this one. What comes back waits for its outcome: `None`, whatever it returns, or the
    name of the exception that it raises."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            result = str(attempt())
        except BaseException as e:
            result = type(e).__name__
        os.write(tell, result.encode())
        os._exit(0)
    os.close(tell)

    def wait() -> str:
        with open(told) as answer:
            result = answer.read()
        os.waitpid(child, 0)
        return result

    return wait


@contextmanager
def shared_folder() -> Iterator[Path]:
    """As /tmp: every user may write to it, and remove what is theirs."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)
