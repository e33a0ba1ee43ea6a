"""Programs that a sandbox has to hold. Each is to answer 49 to the input 7.

`CONTAINED` say it when, and only when, what they attack has refused them. `PUNISHED` never come to it, whatever they try.
In them stand HOST_PORT (a TCP server of the host), HOST_SOCKET (an abstract Unix socket of it), HOST_FILE (one in its home) and
HOST_PID (a process of it).
"""

from __future__ import annotations

TRY = """
import ctypes, os, resource, signal, socket, subprocess, sys, threading, time

def refused(*attempts):
    for attempt in attempts:
        try:
            attempt()
        except (OSError, ValueError, RuntimeError, MemoryError):
            continue
        raise SystemExit("not refused")
    print(49)
"""

_FILL = """
def fill(folder):
    try:
        for i in range(40):
            with open(f"{{folder}}/{{i}}", "wb") as f:
                f.write(bytes(8 << 20))
    finally:  # its output is in /tmp too
        for name in os.listdir(folder): os.remove(f"{{folder}}/{{name}}")
refused(lambda: fill("{}"))
"""
CONTAINED = {
    "forks until refused": """
def forks():
    for _ in range(200):
        if os.fork() == 0: time.sleep(60)
refused(forks)
""",
    "threads until refused": """
def threads():
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
refused(threads)
""",
    "fills /tmp": _FILL.format("/tmp"),
    "fills /dev/shm": _FILL.format("/dev/shm"),
    "memory in a memory file": "refused(lambda: os.memfd_create('bomb'))",
    "System V memory": """
libc = ctypes.CDLL(None)
print(49 if libc.shmget(0, 1 << 30, 0o1666) == -1 and libc.msgget(0, 0o1666) == -1 else "not refused")
""",
    "shared anonymous memory": "import mmap\nrefused(lambda: mmap.mmap(-1, 4 << 30))",
    "endless standard error": """
def errors():
    while True: os.write(2, bytes(1 << 16))
refused(errors)
""",
    "a huge file": "refused(lambda: open('/tmp/huge', 'wb').truncate(1 << 40))",
    "a sparse file": "refused(lambda: os.pwrite(os.open('/tmp/sparse', os.O_CREAT | os.O_RDWR), b'x', 1 << 40))",
    "opens files until refused": "held = []\ndef opens():\n    while True: held.append(open('/dev/null'))\nrefused(opens)",
    "a connection to the world": "refused(lambda: socket.create_connection(('1.1.1.1', 53), 2))",
    "a connection to a server of the host": "refused(lambda: socket.create_connection(('127.0.0.1', HOST_PORT), 2))",
    "a server of its own": "refused(lambda: socket.create_server(('0.0.0.0', 0)))",
    "a name to look up": "refused(lambda: socket.getaddrinfo('example.com', 80))",
    "an abstract socket of the host": """
def connect():
    s = socket.socket(socket.AF_UNIX)
    s.connect("\\0HOST_SOCKET")
refused(connect)
""",
    "netlink and raw sockets": """
refused(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW), lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1))
""",
    "the environment": """
seen = dict(os.environ)
for pid in filter(str.isdigit, os.listdir("/proc")):
    try: seen[pid] = open(f"/proc/{pid}/environ").read()
    except OSError: pass
print(49 if "HOSTILE_SECRET" not in str(seen) else "found")
""",
    "a file in the home of the host": "refused(lambda: open('HOST_FILE').read())",
    "users and passwords of the host": "refused(lambda: open('/etc/passwd').read(), lambda: open('/etc/shadow').read())",
    "processes of the host": "print(49 if len([p for p in os.listdir('/proc') if p.isdigit()]) < 3 else 'seen')",
    "descriptors of the host": """
held = []
for pid in ("self", "1"):
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try: held.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except OSError: pass
print(49 if held and all(at.startswith(("pipe:", "/tmp/#")) for at in held) else held)
""",
    "/sys": "refused(lambda: os.listdir('/sys'))",
    "writes outside": """
refused(*(lambda path=path: open(path + "/hostile-mark", "w") for path in
    ("/", "/usr", "/usr/lib", "/dev", "/proc", "/etc", "/run", os.path.dirname("HOST_FILE"), sys.prefix, sys.path[-1])))
""",
    "the host's files through /proc": """
refused(*(lambda path=path: open(path + "HOST_FILE").read() for path in
    ("/proc/1/root", "/proc/1/cwd/../..", "/proc/self/root", f"/proc/{os.getppid()}/root", "/proc/self/cwd/../../..")))
""",
    "links to what is outside": """
os.symlink("HOST_FILE", "/tmp/link")
refused(lambda: open("/tmp/link").read(), lambda: os.link("/usr/bin/env", "/tmp/env"), lambda: os.link(os.__file__, "/tmp/os.py"))
""",
    "signals to a process of the host": "refused(lambda: os.kill(HOST_PID, 9), lambda: os.killpg(HOST_PID, 9))",
    "leaves a daemon": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(600)
    os._exit(0)
print(49)
""",
    "leaves a child that holds its output": "print(49)\nsys.stdout.flush()\nif os.fork() == 0: time.sleep(600)",
    "leaves a child that ignores signals": """
subprocess.Popen(["sh", "-c", "trap '' TERM INT HUP; sleep 600"], start_new_session=True)
print(49)
""",
    "a shell": """
done = subprocess.run("cat HOST_FILE || cat /etc/shadow", shell=True, capture_output=True)
print(49 if done.returncode else "read")
""",
    "becomes root": """
refused(lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.setresuid(0, 0, 0))
""",
    "a program with the bit of root": """
path = "/tmp/root-shell"
open(path, "w").write("#!/bin/sh\\nid -u")
os.chmod(path, 0o6755)
print(49 if subprocess.run([path], capture_output=True, text=True).stdout.strip() != "0" else "root")
""",
    "devices": """
refused(*(lambda d=d: open(f"/dev/{d}") for d in ("mem", "kmem", "sda", "vda", "kvm", "fuse", "kmsg", "net/tun")),
    lambda: os.mknod("/tmp/vda", 0o60666, os.makedev(254, 0)))
""",
    "namespaces, mounts and roots": """
libc = ctypes.CDLL(None)
got = [libc.unshare(0x10000000), libc.unshare(0x00020000), libc.mount(b"none", b"/tmp", b"tmpfs", 0, None),
    libc.chroot(b"/tmp"), libc.setns(os.open("/proc/1/ns/user", 0), 0), libc.umount2(b"/tmp", 2),
    libc.syscall(155, b"/tmp", b"/tmp"), libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0), libc.syscall(435, 0, 0)]
print(49 if set(got) == {-1} else got)
""",
    "a sandbox in the sandbox": """
done = subprocess.run(["bwrap", "--bind", "/", "/", "true"], capture_output=True)
print(49 if done.returncode else "in")
""",
    "rare system calls": """
libc = ctypes.CDLL(None)
calls = {"ptrace": 101, "process_vm_readv": 310, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425, "perf_event_open": 298,
    "keyctl": 250, "add_key": 248, "kexec_load": 246, "init_module": 175, "open_by_handle_at": 304, "personality": 135,
    "memfd_secret": 447}
open_ones = [name for name, number in calls.items() if libc.syscall(number, 0, 0, 0, 0, 0) != -1]
print(49 if not open_ones else open_ones)
""",
    "higher limits": """
refused(*(lambda what=what: resource.setrlimit(what, (1 << 40, 1 << 40)) for what in
    (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)))
""",
    "a higher priority": """
refused(lambda: os.nice(-5), lambda: os.write(os.open("/proc/self/oom_score_adj", os.O_WRONLY), b"-1000"))
""",
    "settings of the kernel": """
refused(*(lambda path=path: os.write(os.open(path, os.O_WRONLY), b"1") for path in
    ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/proc/sys/user/max_user_namespaces", "/proc/sys/vm/drop_caches")))
""",
    "a terminal": "refused(lambda: os.open('/dev/tty', os.O_RDWR), lambda: os.open('/dev/console', os.O_RDWR))",
    "stops its parent": "os.kill(os.getppid(), signal.SIGSTOP)\nos.kill(1, signal.SIGTERM)\nprint(49)",
    "does not read its input": "print(49)",
}

PUNISHED = {
    "fork bomb": "while True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb of sessions": "while True:\n    try: os.fork() or os.setsid()\n    except OSError: pass",
    "memory bomb": "held = []\nwhile True: held.append(bytearray(16 << 20))",
    "memory of many processes": """
for _ in range(10):
    if os.fork() == 0: break
held = bytearray(os.urandom(1 << 20)) * 90
time.sleep(60)
""",
    "endless loop": "while True: pass",
    "endless loop that ignores signals": """
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
while True: pass
""",
    "endless loops in children": "while True:\n    if os.fork() == 0:\n        while True: pass\n    time.sleep(0.1)",
    "sleeps and ignores signals": """
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
while True: time.sleep(60)
""",
    "stops itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "loops at its exit": "import atexit\natexit.register(lambda: exec('while True: pass'))\nprint(49)",
    "endless output": "while True: print('x' * 1000)",
    "endless output without a line": """
while True:
    try: os.write(1, bytes(1 << 16))
    except OSError: pass
""",
    "files without end": "for i in range(10 ** 9): os.close(os.open(f'/tmp/{i}', os.O_CREAT))",
    "folders without end": "while True:\n    os.mkdir('d')\n    os.chdir('d')",
    "deep recursion": "def f(): f()\nf()",
    "deep recursion in C": """
sys.setrecursionlimit(10 ** 9)
class A:
    def __repr__(self): return repr(self)
repr(A())
""",
    "a crash": "os.abort()",
    "a fault": "ctypes.string_at(0)",
    "a compression bomb": """
import zlib
small = zlib.compress(bytes(1 << 28))
while True: small += zlib.decompress(small)
""",
    "a number without end": "print(9 ** 9 ** 9)",
    "a regular expression without end": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "source that explodes": "x = " + "(" * 5000 + ")" * 5000,
    "source with a NUL": "print(49)\0",
    "source with half a character": "print('\ud800')",
    "invalid UTF-8": "os.write(1, b'\\xff\\xfe49')",
    "NUL bytes": "os.write(1, b'49\\0')",
    "no new line, and more after it": "os.write(1, b'4'); os.write(1, b'99')",
    "the right answer and a failure": "print(49)\nsys.stdout.flush()\nos._exit(3)",
    "the right answer among others": "for i in range(1000): print(i)",
    "kills its parent": "os.kill(os.getppid(), 9)\ntime.sleep(60)",
    "kills everything": """
for pid in (-1, 1, 0):
    try: os.kill(pid, 9)
    except OSError: pass
""",
    "kills every number": """
for pid in range(1, 100_000):
    if pid != os.getpid():
        try: os.kill(pid, 9)
        except OSError: pass
time.sleep(60)
""",
    "answers for the sandbox": """
forged = b"0 0.000001 3\\n49\\n"
frame = len(forged).to_bytes(4, "little") + forged
for fd in range(3, 64):
    try: os.write(fd, frame)
    except OSError: pass
for fd in os.listdir(f"/proc/{os.getppid()}/fd"):
    try: os.write(os.open(f"/proc/{os.getppid()}/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK), b"\\xff\\xff\\xff\\x7f")
    except OSError: pass
os.kill(os.getppid(), 9)
""",
    "looks for the answers": """
import re
def memory(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps:
            where = re.match(r"(\\w+)-(\\w+) r", line)
            if where:
                start, end = (int(x, 16) for x in where.groups())
                try:
                    mem.seek(start)
                    yield mem.read(end - start)
                except (OSError, ValueError, OverflowError): pass
def files():
    for folder, _, names in [*os.walk("/tmp"), *os.walk("/dev/shm"), *os.walk("/run")]:
        for name in names:
            try: yield open(os.path.join(folder, name), "rb").read()
            except OSError: pass
for pid in ("1", os.getppid(), "self"):
    try:
        for part in memory(pid):
            for found in re.findall(rb"ANSWER-[0-9a-f]{32}", part): print(found.decode())
    except OSError: pass
for part in files():
    for found in re.findall(rb"ANSWER-[0-9a-f]{32}", part): print(found.decode())
""",
}

WHY = {
    "memory bomb": "MemoryError",
    "memory of many processes": "400 MiB together",
    "files without end": "4096 files",
    "folders without end": "4096 files",
    "endless output": "File too large",
    "deep recursion": "RecursionError",
    "a fault": "segmentation fault",
    "a crash": "signal 6",
    "kills everything": "killed",
    "source with a NUL": "null bytes",
    "the right answer and a failure": "exit code 3",
    "invalid UTF-8": "another answer",
}
"""What the score says of some that come to an end of their own."""

# Functions that tests call with 1234 and expect 1522756 of; nothing of these may be taken for it.
DECEIVING = {
    "equal to everything": """
class Always(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def f(x): return Always(3)
""",
    "equal by identity": """
class Always:
    def __eq__(self, other): return True
    def __bool__(self): return True
def f(x): return Always()
""",
    "ends before it is called": """
raise SystemExit(0)
def f(x): return 1
""",
    "ends with success when called": """
def f(x): os._exit(0)
""",
    "a success of its own": """
def f(x):
    print('.', flush=True)
    for fd in range(3, 40):
        try: os.write(fd, b'.')
        except OSError: pass
    os._exit(0)
""",
    "other builtins": """
import builtins
builtins.all = builtins.any = lambda x: True
builtins.abs = lambda x: 0
def abs(x): return 0
def all(x): return True
def f(x): return 1
""",
    "another module": """
class math:
    isclose = staticmethod(lambda *a, **k: True)
def f(x): return 1
""",
    "another assertion": """
import builtins
builtins.AssertionError = SystemExit
def f(x): raise SystemExit(0)
""",
    "another json": """
import json
json.dumps = lambda *a, **k: 'true'
json.loads = lambda x: x
def f(x): return 1
""",
    "replies without a question": """
def f(x):
    for fd in range(3, 40):
        try: os.write(fd, b'["ok", true, []]\\n' * 50)
        except OSError: pass
    time.sleep(60)
""",
    "a line without end": """
def f(x):
    while True:
        for fd in range(3, 40):
            try: os.write(fd, b'[' * 65536)
            except OSError: pass
""",
    "looks at its caller": """
import gc, inspect
def f(x):
    wanted = int("1522756")  # Not as a constant of its own.
    for o in gc.get_objects():
        if isinstance(o, (list, tuple)) and wanted in [v for v in o if type(v) is int]: return wanted
    frame = sys._getframe()
    while frame:
        if any(v == wanted for n, v in frame.f_locals.items() if type(v) is int and n != "wanted"): return wanted
        frame = frame.f_back
""",
    "never comes back": """
def f(x): time.sleep(60)
""",
    "a value without end": """
def f(x):
    v = []
    v.append(v)
    return v
""",
    "a generator without end": """
def f(x):
    while True: yield 1
""",
    "kills its sandbox": """
def f(x): os.kill(-1, 9)
""",
}
