"""Scoring processes that need nothing of the host have no network: built-in rewards read what a model wrote."""

from __future__ import annotations

import ctypes
import os
import sys

from grpo_ray.errors import RewardError
from grpo_ray.sandbox.isolation import refuse_connections

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000


def leave_network() -> None:
    """Give this process, and all that it starts, a network of its own without interfaces, and a filter that refuses connections.
    Either one is enough; the filter closes sockets in the file system too. Only Linux has them.

    Raises:
        RewardError: neither is available here.
    """
    if sys.platform != "linux":
        return
    troubles = [trouble for attempt in (_new_network, _no_connections) if (trouble := attempt())]
    if len(troubles) == 2:
        raise RewardError(
            f"built-in rewards are not run with a network, and this one can't be left: {'; '.join(troubles)}. Allow user "
            "namespaces, or install libseccomp 2"
        )


def _new_network() -> str:
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET if user == 0 else CLONE_NEWUSER | CLONE_NEWNET) != 0:
        return f"unshare: {os.strerror(ctypes.get_errno())}"
    if user != 0:
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as f:
                f.write(text)
    return ""


def _no_connections() -> str:
    try:
        refuse_connections()
    except RewardError as e:
        return str(e)
    return ""
