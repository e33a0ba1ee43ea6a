"""Another user of the machine, for tests that are root's."""

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
    """What comes of it as the user nobody: `None`, or whatever it returns, or the name of the exception that it raises.

    In a fork: an interpreter that lies in root's home could not be started by others.
    """
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.umask(0)
            os.chdir("/")
            result = str(attempt())
        except BaseException as e:
            result = type(e).__name__
        os.write(tell, result.encode())
        os._exit(0)
    os.close(tell)
    with open(told) as answer:
        result = answer.read()
    os.waitpid(child, 0)
    return result


@contextmanager
def shared_folder() -> Iterator[Path]:
    """As /tmp: every user may write to it, and remove what is theirs."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)
