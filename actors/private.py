"""Folders of this user alone. A path that another user of the machine could have written, or could still change, is not used.

`python -P -m actors.private` prints the folder for temporary files, which the start scripts give to Ray.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import stat
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from actors.folders import PREFIX, candidates, too_long, unusable

TEMPORARY = ("RAY_TMPDIR", "TMPDIR")
"""The variables that name the folder of Ray's sessions; the first that is set counts."""
MAX_LINKS = 40
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH
_INITIAL_USERS = ["0", "0", "4294967295"]


def why_open(path: str | Path) -> str | None:
    """Why a user other than this one and root could put something at `path`, or change what is there; None: nobody can.

    Every folder on the way counts, through links. The path itself need not exist.
    """
    return _look(path)[0]


def is_closed(path: str | Path) -> bool:
    """Whether no other user can even reach what is at `path`."""
    reason, closed = _look(path)
    return reason is None and closed


def private_folder() -> Path:
    """The folder of this user for temporary files and Ray's sessions: mode 0700, short enough for sockets, below the folder that
    the environment names or the first suitable one. It is created if missing.

    Raises:
        FileNotFoundError: no folder is suitable.
    """
    named = [os.environ[name] for name in TEMPORARY if os.environ.get(name)]
    places = [p for p in (*named, *candidates()) if unusable(p) is None]
    for place in places:
        if is_closed(place) and not too_long(place):
            return Path(place)
        own = Path(place, f"{PREFIX}{os.getuid()}")
        if not too_long(str(own)) and _make(own):
            return own
    for place in places:
        # Another user has taken the name.
        if not too_long(f"{place}/{PREFIX}01234567"):
            return Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    raise FileNotFoundError("there is no place for temporary files: set TMPDIR to a folder of yours, mode 0700")


def make_private(place: Path) -> Path:
    """The place itself if no other user can enter it, else a folder of this user in it, which is created."""
    own = place / f"{PREFIX}{os.getuid()}"
    if is_closed(place):
        return place
    return own if _make(own) else Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))


def use_private_temporary_files() -> Path:
    """Make this process, and those that it starts, keep temporary files in `private_folder`."""
    folder = private_folder()
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    if "RAY_TMPDIR" in os.environ:
        os.environ["RAY_TMPDIR"] = str(folder)
    return folder


def _make(folder: Path) -> bool:
    """Create the folder, or accept it if it is this user's, is not a link, and was closed to others."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & _OTHERS
    return own and is_closed(folder)


def _look(path: str | Path) -> tuple[str | None, bool]:
    """Why the path is open to others, and whether they are kept out on the way."""
    left = _parts(os.path.join(os.getcwd(), os.path.expanduser(path)))
    here, closed, links = "/", False, 0
    status = os.lstat(here)
    while True:
        if not closed and (reason := _why_not_ours(here, status)) is not None:
            return reason, False
        closed = closed or not status.st_mode & _OTHERS_ENTER
        if not left:
            return (None if closed else _why_writable(here, status)), closed
        name = left.pop()
        if name == "..":
            left = [*left, *_parts(os.path.dirname(here))]
            here, closed, status = "/", False, os.lstat("/")
            continue
        entry = os.path.join(here, name)
        try:
            found = os.lstat(entry)
        except FileNotFoundError:
            return (None if closed else _why_writable(here, status)), closed
        except OSError as e:
            return f"{entry} can't be looked at ({e.strerror})", False
        if not closed and (reason := _why_replaceable(entry, status, found)) is not None:
            return reason, False
        if not stat.S_ISLNK(found.st_mode):
            here, status = entry, found
            continue
        links += 1
        if links > MAX_LINKS:
            return f"{entry} is a link that leads in circles", False
        left = [*left, *_parts(os.path.join(here, os.readlink(entry)))]
        here, closed, status = "/", False, os.lstat("/")


def _parts(path: str) -> list[str]:
    """The parts of the path, the last first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _why_not_ours(path: str, status: os.stat_result) -> str | None:
    return None if status.st_uid in _trusted() else f"{path} belongs to {_name(status.st_uid)}"


def _why_writable(path: str, status: os.stat_result) -> str | None:
    if status.st_mode & stat.S_IWOTH:
        return f"every user can write to {path}"
    if status.st_mode & stat.S_IWGRP and status.st_gid not in _own_groups():
        return f"the group {status.st_gid} can write to {path}"
    if status.st_mode & stat.S_IWGRP and _has_access_list(path):
        return f"users of an access list (getfacl) can write to {path}"
    return None


def _has_access_list(path: str) -> bool:
    """Whether the mode's bits of the group are the most that users of a list may do, and not what the group may."""
    try:
        os.getxattr(path, "system.posix_acl_access")
    except OSError:
        return False
    return True


def _why_replaceable(path: str, status: os.stat_result, entry: os.stat_result) -> str | None:
    """Why an existing entry can be replaced: in a sticky folder only its owner may rename or remove it."""
    if status.st_mode & stat.S_ISVTX:
        return _why_not_ours(path, entry)
    return _why_writable(os.path.dirname(path), status)


@cache
def _trusted() -> frozenset[int]:
    """This user and root; in a user namespace also the user that root is mapped to."""
    with open("/proc/self/uid_map") as users:
        initial = users.read().split() == _INITIAL_USERS
    return frozenset({0, os.getuid(), *(() if initial else _unmapped())})


def _unmapped() -> Iterator[int]:
    with open("/proc/sys/kernel/overflowuid") as number:
        yield int(number.read())


@cache
def _own_groups() -> frozenset[int]:
    """The groups of root, and this user's own where it is a group of one, as distributions create them."""
    try:
        user = pwd.getpwuid(os.getuid())
        group = grp.getgrgid(user.pw_gid)
    except KeyError:
        return frozenset({0})
    alone = group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
    return frozenset({0, *([group.gr_gid] if alone else [])})


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"the user {uid}"


if __name__ == "__main__":
    print(private_folder())
