"""The cage: bubblewrap's command line, libseccomp's filter, and a trial of both before anything is run in them."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from grpo_ray.errors import RewardError

NOBODY = 65534
"""Who runs programs, inside always, outside where we are root."""
LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""Into /usr, on most systems."""
SYSTEM = (
    *("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/libexec", "/usr/include"),
    *("/usr/share", "/usr/local/bin", "/usr/local/lib"),
)
"""Not all of /usr: images keep projects, and their runs, in /usr/src or /usr/local."""
CACHES = ("/etc/ld.so.cache", "/etc/alternatives")
"""Where libraries and commands are, of no interest otherwise."""
PATH = "/usr/local/bin:/usr/bin:/bin"
MAX_FILES = 4096
MEND = (
    "grpo-ray never runs a model's program without isolation. Needed: bubblewrap 0.8 or newer, libseccomp 2 and util-linux "
    "(Debian: apt-get install bubblewrap libseccomp2), and user namespaces: sysctl user.max_user_namespaces above 0, on "
    "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, in Docker --security-opt seccomp=unconfined --security-opt "
    "systempaths=unconfined"
)
# What no ordinary program calls: memory that no rlimit counts, ways into other processes, the kernel, and out of the namespace.
REFUSED = """
    shmget shmat shmctl semget semop semtimedop semctl msgget msgsnd msgrcv msgctl mq_open memfd_create memfd_secret
    ptrace process_vm_readv process_vm_writev process_madvise kcmp pidfd_getfd
    socket socketcall bind connect listen accept accept4
    unshare setns mount umount umount2 pivot_root chroot fsopen fsmount fspick fsconfig move_mount open_tree mount_setattr
    bpf perf_event_open userfaultfd io_uring_setup io_uring_enter io_uring_register keyctl add_key request_key
    fanotify_init inotify_init inotify_init1 name_to_handle_at open_by_handle_at quotactl quotactl_fd
    kexec_load kexec_file_load init_module finit_module delete_module reboot swapon swapoff acct syslog
    settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname ioperm iopl modify_ldt personality vhangup
    mknod mknodat lookup_dcookie nfsservctl uselib vmsplice migrate_pages move_pages mbind set_mempolicy
"""
NEW_NAMESPACES = 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000
"""CLONE_NEW*: cgroup, uts, ipc, user, pid, net, mount."""


@dataclass(frozen=True)
class Languages:
    """What has to be visible for the programs to run, besides /usr. Read-only."""

    read_only: tuple[str, ...] = ()
    """Folders, at the same place inside."""
    python_path: tuple[str, ...] = ()
    """Folders, and Python finds modules in them."""

    @property
    def folders(self) -> list[str]:
        python = [os.path.dirname(interpreter()), f"{os.path.realpath(sys.base_prefix)}/lib"]
        wanted = dict.fromkeys([*python, *self.read_only, *self.python_path])
        return [p for p in wanted if not any(Path(p).is_relative_to(shown) for shown in SYSTEM)]


def interpreter() -> str:
    """This Python itself: a virtual environment's is a link to it."""
    return os.path.realpath(sys.executable)


@lru_cache(maxsize=1)
def syscall_filter() -> bytes:
    """The compiled filter. clone3 hides its flags in memory; refused as unknown, the C library falls back to clone.

    Raises:
        RewardError: libseccomp is not there.
    """
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError, AttributeError) as e:
        raise RewardError(f"libseccomp can't be loaded ({e}). {MEND}") from None
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in REFUSED.split():
        try:
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
        except (OSError, ValueError):
            if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:
                raise
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for flag in (1 << bit for bit in range(32) if NEW_NAMESPACES >> bit & 1):
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, flag, flag))
    with tempfile.TemporaryFile() as f:
        rules.export_bpf(f)
        f.seek(0)
        return f.read()


def command(
    languages: Languages, *, filter_fd: int, info_fd: int, disk_bytes: int
) -> tuple[list[str], tuple[int, ...]]:
    """The command line that starts a sandbox, to which is to be added what runs in it; and the descriptors that it needs.

    Raises:
        RewardError: a tool is not installed.
    """
    bwrap, first = _tool("bwrap"), []
    fds: tuple[int, ...] = (filter_fd, info_fd)
    sources = {folder: folder for folder in languages.folders}
    if os.geteuid() == 0:
        stage = _stage(tuple(sources))
        sources = {folder: f"/run/{i}" for i, folder in enumerate(sources)}
        first = [_tool("nsenter"), f"--mount=/proc/self/fd/{stage}", f"--setuid={NOBODY}", f"--setgid={NOBODY}", "--"]
        fds = (*fds, stage)
    parts = [bwrap, "--unshare-all", "--unshare-user", "--disable-userns", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    parts += ["--as-pid-1", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--hostname", "sandbox"]
    parts += ["--seccomp", str(filter_fd), "--info-fd", str(info_fd)]
    for path in (*SYSTEM, *LINKS):
        if os.path.islink(path):
            parts += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            parts += ["--ro-bind", path, path]
    for path in filter(os.path.exists, CACHES):
        parts += ["--ro-bind", path, path]
    half = str(disk_bytes // 2)
    parts += ["--proc", "/proc", "--dev", "/dev", "--size", half, "--perms", "1777", "--tmpfs", "/dev/shm"]
    parts += ["--size", half, "--perms", "1777", "--tmpfs", "/tmp"]
    for folder, source in sources.items():
        parts += ["--ro-bind", source, folder]
    parts += ["--remount-ro", "/dev", "--remount-ro", "/"]
    parts += ["--chdir", "/tmp", "--clearenv", "--setenv", "PATH", PATH, "--setenv", "HOME", "/tmp"]
    return [*first, *parts, "--setenv", "LANG", "C.UTF-8", "--setenv", "OMP_NUM_THREADS", "1", "--"], fds


@lru_cache(maxsize=8)
def _stage(folders: tuple[str, ...]) -> int:
    """Of root alone: a mount namespace that differs from ours in that folder i is at /run/i.

    RLIMIT_NPROC does not bind root, so under root bwrap and all in it run as nobody, who may not pass /root on the way to an
    interpreter.
    """
    mounts = ["mount -t tmpfs -o mode=755 tmpfs /run"]
    mounts += [f'mkdir /run/{i} && mount --rbind "${i + 1}" /run/{i}' for i in range(len(folders))]
    holder = subprocess.Popen(
        [
            *(_tool("unshare"), "--mount", "--propagation=private"),
            *("sh", "-c", " && ".join([*mounts, "echo made; read end"]), "sh", *folders),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": f"{PATH}:/usr/sbin:/sbin"},
    )
    assert holder.stdout is not None
    with holder:
        if holder.stdout.readline() != b"made\n":
            trouble = last_line(holder.communicate(timeout=10)[1].decode(errors="replace").splitlines())
            raise RewardError(f"no sandbox can be started: {trouble}. {MEND}")
        fd = os.open(f"/proc/{holder.pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        holder.communicate(b"end\n", timeout=10)
    return fd


def _tool(name: str) -> str:
    found = shutil.which(name, path=f"{PATH}:/usr/sbin:/sbin")
    if found is None:
        raise RewardError(f"{name} is not installed. {MEND}")
    return found


# Each line is something that must not work; what does is printed.
TRIAL = """
import ctypes, os, resource, socket

def breach(what, attempt, *args):
    try:
        attempt(*args)
    except (OSError, ValueError):
        return
    print(what)

if left := [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line and "lo:" not in line]:
    print("it sees the network interfaces", *left)
breach("it opens a socket", socket.socket)
breach("it writes to the root", open, "/grpo-ray-breach", "w")
breach("it writes to /dev", open, "/dev/grpo-ray-breach", "w")
breach("it writes to /usr", open, "/usr/grpo-ray-breach", "w")
breach("it raises its limit of processes", resource.setrlimit, resource.RLIMIT_NPROC, (9999, 9999))
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000) == 0:
    print("it makes a user namespace")
if libc.shmget(0, 4096, 0o1600) >= 0:
    print("it makes System V memory")
if os.getuid() != 65534:
    print("it runs as user", os.getuid())
if len(pids := [p for p in os.listdir("/proc") if p.isdigit()]) > 2:
    print("it sees the processes", *pids)
if left := set(os.environ) - {"PATH", "HOME", "LANG", "PWD", "OMP_NUM_THREADS"}:
    print("it has the environment", *left)
for path in ("/etc/passwd", "/sys/kernel", "/run/lock"):
    if os.path.exists(path):
        print("it sees", path)
if (status := open("/proc/self/status").read()) and ("NoNewPrivs:\\t1" not in status or "CapEff:\\t0000000000000000" not in status):
    print("it has privileges")
children = []
try:
    for _ in range(64):
        if (pid := os.fork()) == 0:
            os.read(os.pipe()[0], 1)
        children.append(pid)
    print("it forks without end")
except OSError:
    pass
try:
    bytearray(1 << 34)
    print("it takes 16 GiB of memory")
except MemoryError:
    pass
print("tried", end="")
"""


async def check_isolation(languages: Languages) -> None:
    """Run a program that tries to get out.

    Raises:
        RewardError: no sandbox can be started, or it is not tight; says which, and the mend.
    """
    from grpo_ray.sandbox.box import Box, BoxEnded, Limits

    for folder in languages.folders:
        if not os.path.isdir(folder):
            raise RewardError(f"there is no folder {folder!r} to show to programs; mend read_only or python_path")
        if os.geteuid() == 0 and os.stat(folder).st_mode & 0o005 != 0o005:
            raise RewardError(
                f"folder {folder!r} is root's alone, and under root programs run as nobody; chmod o+rx, or run as another user"
            )
    try:
        async with await Box.start(TRIAL, Limits(), languages) as box:
            outcome = await box.script(b"")
    except (BoxEnded, TimeoutError) as e:
        raise RewardError(f"the sandbox ended in its own trial ({type(e).__name__}: {e}). {MEND}") from None
    said = outcome.output.decode(errors="replace").splitlines()
    if said != ["tried"]:
        trouble = "; ".join(said[:5]) or outcome.trouble or f"exit code {outcome.code}"
        raise RewardError(f"the sandbox is not tight: {trouble}. {MEND}")


def last_line(lines: Sequence[str]) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
