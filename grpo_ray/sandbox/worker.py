"""The code that `verifier` runs inside the sandbox, sent there as source for `inside`, whose functions it uses."""

from __future__ import annotations

import json
import os
import resource
import signal
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from grpo_ray.sandbox.inside import Job, end_all, end_of, receive, run, write


def keep_verifying(source: str, request: dict[str, Any], *ours: int) -> Job:
    """The job of a process that verifies. If one ends, the client gets the answers so far and notice of the end, and the next
    starts."""
    fd, nothing = request["fd"], os.open("/dev/null", os.O_RDWR)
    write(fd, b"null\n")
    while True:
        errors, results = (os.open("/tmp", os.O_TMPFILE | os.O_RDWR) for _ in range(2))
        child = os.fork()
        if child == 0:
            for number, at in enumerate((nothing, nothing, errors)):
                os.dup2(at, number)
            for inherited in {nothing, errors, *ours}:
                os.close(inherited)
            return lambda: verify(source, fd, results, request)
        _, status = os.waitpid(child, 0)
        end_all()
        ended = {"ended": os.waitstatus_to_exitcode(status), "trouble": end_of(errors).decode(errors="replace")}
        given = os.pread(results, os.fstat(results).st_size, 0)
        os.close(errors)
        os.close(results)
        write(fd, given[: given.rfind(b"\n") + 1] + json.dumps(ended).encode() + b"\n")


def verify(source: str, fd: int, results: int, request: dict[str, Any]) -> None:
    """Write a line of JSON with `verify(*item)` of the program for each item of each message. `renew()` resets its limits."""
    given, until = 0, 0.0

    def renew() -> None:
        nonlocal given, until
        if (limit := int(time.process_time()) + 1 + request["cpu_s"]) != given:
            given = limit
            resource.setrlimit(resource.RLIMIT_CPU, (given, resource.RLIM_INFINITY))
        if (now := time.monotonic()) > until:
            until = now + 1
            signal.alarm(request["item_s"])

    namespace = run(source, renew=renew)
    while (items := receive(fd)) is not None:
        for item in items:
            renew()
            write(results, json.dumps(namespace["verify"](*item)).encode() + b"\n")
        signal.alarm(0)
        until = 0.0
        write(fd, os.pread(results, os.fstat(results).st_size, 0))
        os.lseek(results, 0, os.SEEK_SET)
        os.ftruncate(results, 0)
