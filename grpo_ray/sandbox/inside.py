"""The code that runs inside the sandbox, sent there as source: it answers requests, each in a process of its own.

It holds nothing that a program could profit from: answers are compared outside. So its only duty is that its limits hold for what
it starts. Imports are most of the cost of a sandbox (json 8 ms, typing 20): each is done only where it is needed.
"""

from __future__ import annotations

import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Job = Callable[[], object]

HEADER_BYTES = 4
MAX_STDERR_BYTES = 2000


def main() -> Job | None:
    """Answer requests; returns None when the parent has no more, or, in the process of one request, the job to do there."""
    requests, replies = os.dup(0), os.dup(1)
    send(replies, b"started")
    setup = receive(requests)
    assert setup is not None
    close_all_but({0, 1, 2, requests, replies, *setup["fds"]})
    for name, value in setup["limits"].items():
        limit(name, value)
    sys.path.extend(setup["python_path"])
    for module in setup["imports"]:
        __import__(module)
    if setup["file"]:
        with open(setup["file"], "w", encoding="utf-8", errors="surrogatepass") as f:
            f.write(setup["source"])
    while (request := receive(requests)) is not None:
        if request["kind"] == "verify":
            worker = globals().copy()
            exec(request["worker"], worker)
            answer: Callable[[], object] | None = worker["keep_verifying"](setup["source"], request, requests, replies)
            return answer
        result, errors, stdin = (os.open("/tmp", os.O_TMPFILE | os.O_RDWR) for _ in range(3))
        write(stdin, request["stdin"])
        os.lseek(stdin, 0, os.SEEK_SET)
        child = os.fork()
        if child == 0:
            os.close(requests)
            os.close(replies)
            return prepare(setup, request, stdin, result, errors)
        if "fd" in request:
            os.close(request["fd"])
        _, status, used = os.wait4(child, 0)
        end_all()
        code = os.waitstatus_to_exitcode(status)
        output = os.pread(result, os.fstat(result).st_size, 0)
        trouble = end_of(errors)
        for fd in (result, errors, stdin):
            os.close(fd)
        seconds = used.ru_utime + used.ru_stime
        send(replies, b"%d %.6f %d\n%b%b" % (code, seconds, len(output), output, trouble))
    return None


def end_of(errors: int) -> bytes:
    size = os.fstat(errors).st_size
    return os.pread(errors, MAX_STDERR_BYTES, max(0, size - MAX_STDERR_BYTES))


def close_all_but(kept: set[int]) -> None:
    """Close what the tools that created this sandbox left open, a namespace of the host among it."""
    edges = sorted(kept)
    for low, high in zip(edges, [*edges[1:], 1 << 20], strict=True):
        os.closerange(low + 1, high)


def end_all() -> None:
    """Kill what a request left behind. This is the namespace's first process: the kill spares it, it ignores the program's own
    signals, and it is the parent of every orphan."""
    try:
        os.kill(-1, 9)
        while True:
            os.wait()
    except (ProcessLookupError, ChildProcessError):
        pass


def prepare(setup: dict[str, Any], request: dict[str, Any], stdin: int, result: int, errors: int) -> Job:
    """Make this process the one that the program expects to run in."""
    kind = request["kind"]
    out = result if kind in ("script", "command") else os.open("/dev/null", os.O_WRONLY)
    os.dup2(stdin, 0)
    os.dup2(out, 1)
    os.dup2(errors, 2)
    kept = {"call": result, "judge": result}.get(kind)
    for fd in {stdin, out, errors, result} - {kept}:
        os.close(fd)
    soft = request["cpu_s"]
    resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 1))
    if kind == "command":
        argv = request["argv"]
        return lambda: os.execvpe(argv[0], argv, dict(os.environ))
    if kind == "script":
        return lambda: run(setup["source"])
    if kind == "call":
        return lambda: call(run(setup["source"]), request, result)
    remote: dict[str, Any] = {"__name__": "remote"}
    exec(setup["remote"], remote)
    if kind == "serve":
        return lambda: remote["serve"](run(setup["source"]), request["fd"])
    return lambda: remote["judge"](request, result)


def run(source: str, **given: Any) -> dict[str, Any]:
    """Run the program as `__main__`, with these names; an uncaught exception ends this process as it would end the interpreter."""
    import builtins

    module = type(sys)("__main__")
    sys.modules["__main__"] = module
    sys.argv = ["program.py"]
    # The site module, which is not loaded, provides these two.
    vars(builtins)["exit"] = vars(builtins)["quit"] = sys.exit
    module.__dict__.update(given, __file__="program.py", __builtins__=builtins)
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def end() -> None:
    """End like an interpreter, but without its teardown, which costs as much as all the rest of a short program."""
    import atexit

    if "threading" in sys.modules:
        sys.modules["threading"]._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def call(namespace: dict[str, Any], request: dict[str, Any], result: int) -> None:
    """Call `function(*args)` of the program, or of its class Solution, and send the value as JSON."""
    import json

    name = request["function"]
    function = namespace[name] if name in namespace else getattr(namespace["Solution"](), name)
    sys.set_int_max_str_digits(0)
    value = function(*json.loads(request["args"]))
    write(result, json.dumps(value).encode("utf-8", "surrogatepass"))


def limit(name: str, value: int) -> None:
    """Set the soft and the hard limit, permanently, never above the present one."""
    number = getattr(resource, name)
    hard = resource.getrlimit(number)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(number, (value, value))


def send(fd: int, body: bytes) -> None:
    write(fd, len(body).to_bytes(HEADER_BYTES, "little") + body)


def receive(fd: int) -> Any:
    """The next message; None at the end."""
    header = read(fd, HEADER_BYTES)
    return marshal.loads(read(fd, int.from_bytes(header, "little"))) if header else None


def write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def read(fd: int, size: int) -> bytes:
    parts = []
    while size and (part := os.read(fd, min(size, 1 << 20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


if __name__ == "__main__" and (job := main()) is not None:
    job()
    end()
