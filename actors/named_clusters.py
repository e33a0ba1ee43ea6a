"""The clusters that may receive Ray's token: those that the user named, not those in a stranger's recipe or run folder.

Named are the address in `RAY_ADDRESS`, one typed as an override, one confirmed on a terminal, and the heads that the user's
processes on this machine belong to. Those typed and confirmed are noted in a file, so that `resume` and the next run do not ask
again.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from actors.addresses import OPTION, VARIABLE, Address, heads_here
from actors.private import why_open
from grpo_ray.errors import ConfigError
from grpo_ray.plain_terminal import say

NAMED_FILE = "grpo-ray/clusters"
"""The file of named clusters, below the folder for configurations; one address a line."""
_noted: set[str] = set()
"""The addresses noted in this process, where the file can't be written."""


def named_file() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", NAMED_FILE)


def is_named(address: Address) -> bool:
    """Whether the user named the address."""
    if address.source == VARIABLE or address.where == "auto":
        return True
    in_environment = os.environ.get(VARIABLE, "").strip()
    return address.where in {in_environment, *_noted, *_read()} or address.where in heads_here()


def note(address: Address) -> None:
    """Record the address as named by the user, from now on."""
    if is_named(address):
        return
    _noted.add(address.where)
    file = named_file()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "w") as opened:
            opened.write(f"{address.where}\n")
    except OSError as e:
        say(f"note: {file} can't be written ({e.strerror}), so {address.where} will have to be named again", error=True)


def check_named(address: Address) -> None:
    """Raise ConfigError for an address that the user has not named."""
    if not is_named(address):
        raise ConfigError(
            f"{OPTION} {address.where} is named by the recipe or the run's folder, not by you, and a cluster that is joined gets "
            f"Ray's token and your code: if it is yours, name it once on the command line ({OPTION}={address.where}) or in "
            f"{VARIABLE}, or leave {OPTION} out"
        )


def _read() -> set[str]:
    """The addresses in the file, if no other user can have written to it."""
    file = named_file()
    try:
        if why_open(file.parent) is not None:
            return set()
        with file.open() as opened:
            status = os.fstat(opened.fileno())
            own = status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            return set(opened.read().split()) if own else set()
    except (OSError, UnicodeDecodeError):
        return set()
