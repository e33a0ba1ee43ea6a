"""The isolation of a sandbox: bubblewrap's command line and libseccomp's filter."""

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
from typing import Any

from grpo_ray.errors import RewardError

NOBODY = 65534
"""The user that runs programs, always inside, and outside if we are root."""
LINKS = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")
"""The links into /usr on most systems."""
SYSTEM = (
    *("/usr/bin", "/usr/sbin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/libx32", "/usr/libexec", "/usr/include"),
    *("/usr/share", "/usr/local/bin", "/usr/local/lib"),
)
"""The visible folders. Not all of /usr: images keep projects, and their runs, in /usr/src or /usr/local."""
CACHES = ("/etc/ld.so.cache", "/etc/alternatives")
"""Files that say where libraries and commands are, and hold nothing private."""
PATH = "/usr/local/bin:/usr/bin:/bin"
MEND = (
    "grpo-ray never runs a model's program without isolation. Needed: bubblewrap 0.8 or newer, libseccomp 2 and util-linux "
    "(Debian: apt-get install bubblewrap libseccomp2), and user namespaces: sysctl user.max_user_namespaces above 0, on "
    "Ubuntu kernel.apparmor_restrict_unprivileged_userns=0, in Docker --security-opt seccomp=unconfined --security-opt "
    "systempaths=unconfined"
)
# The system calls that no ordinary program uses: memory that no rlimit counts, access to other processes, the kernel,
# and ways out of the namespace.
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
    setsockopt setxattr lsetxattr fsetxattr io_setup io_submit io_destroy
    landlock_create_ruleset landlock_add_rule landlock_restrict_self
"""
NEWER = range(453, 512)
"""The numbers of system calls after Linux 6.6, which are missing here as on an older kernel."""
NEW_NAMESPACES = 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000 | 0x00020000
"""The flags CLONE_NEW*: cgroup, uts, ipc, user, pid, net, mount."""
CLONE_FILES, CLONE_THREAD = 0x400, 0x10000
MAP_SHARED, MAP_ANONYMOUS, MAP_HUGETLB = 0x1, 0x20, 0x40000
F_SETPIPE_SZ = 1031
PR_SET_DUMPABLE = 4
AF_UNIX, AF_NETLINK, AF_MAX = 1, 16, 64

# (system call, number of an argument, mask, value): pages that nobody maps any more and no process is charged for, huge
# pages that no measure of a process includes, threads with descriptors that /proc/PID/fd does not show, pipes of a MiB,
# and processes that hide from the measurement.
_REFUSED_WITH = (
    *(("clone", 0, 1 << bit, 1 << bit) for bit in range(32) if NEW_NAMESPACES >> bit & 1),
    ("clone", 0, CLONE_THREAD | CLONE_FILES, CLONE_THREAD),
    ("mmap", 3, MAP_SHARED | MAP_ANONYMOUS, MAP_SHARED | MAP_ANONYMOUS),
    ("mmap", 3, MAP_HUGETLB, MAP_HUGETLB),
    ("fcntl", 1, 0xFFFFFFFF, F_SETPIPE_SZ),  # of which the kernel reads the lower half
    ("prctl", 0, 0xFFFFFFFF, PR_SET_DUMPABLE),
)


@dataclass(frozen=True)
class Languages:
    """The files that programs need to run, besides /usr. Read-only."""

    read_only: tuple[str, ...] = ()
    """Folders that are visible at the same path inside."""
    python_path: tuple[str, ...] = ()
    """Folders in which Python finds modules."""

    @property
    def folders(self) -> list[str]:
        python = [os.path.dirname(interpreter()), f"{os.path.realpath(sys.base_prefix)}/lib"]
        wanted = dict.fromkeys([*python, *self.read_only, *self.python_path])
        return [p for p in wanted if not any(Path(p).is_relative_to(shown) for shown in SYSTEM)]


def interpreter() -> str:
    """The path of this Python itself; a virtual environment's is a link to it."""
    return os.path.realpath(sys.executable)


@lru_cache(maxsize=1)
def syscall_filter() -> bytes:
    """The compiled filter. clone3 hides its flags in memory; it is refused as unknown, and the C library falls back to clone.

    Raises:
        RewardError: libseccomp is missing.
    """
    pyseccomp = _libseccomp()
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for name in REFUSED.split():
        try:
            rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
        except (OSError, ValueError):
            if pyseccomp.resolve_syscall(pyseccomp.system_arch(), name) >= 0:
                raise
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    for name, number, mask, value in _REFUSED_WITH:
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name, pyseccomp.Arg(number, pyseccomp.MASKED_EQ, mask, value))
    rules.add_rule(pyseccomp.ERRNO(errno.EPERM), "socketpair", pyseccomp.Arg(0, pyseccomp.NE, AF_UNIX))
    for newer in NEWER:
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), newer)
    with tempfile.TemporaryFile() as f:
        rules.export_bpf(f)
        f.seek(0)
        return f.read()


def refuse_connections() -> None:
    """Forbid this process and all that it starts to connect to anything, permanently. bubblewrap, which asks the kernel for a
    sandbox's loopback interface, still works.

    Raises:
        RewardError: libseccomp is missing, or the kernel does not accept its filter.
    """
    pyseccomp = _libseccomp()
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)
    for name in ("connect", "listen", "socketcall", "io_uring_setup", "io_uring_enter", "io_uring_register"):
        rules.add_rule(pyseccomp.ERRNO(errno.EPERM), name)
    for family in set(range(AF_MAX)) - {AF_UNIX, AF_NETLINK}:
        rules.add_rule(
            pyseccomp.ERRNO(errno.EPERM), "socket", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, 0xFFFFFFFF, family)
        )
    try:
        rules.load()
    except OSError as e:
        raise RewardError(f"a filter of system calls can't be loaded: {e}") from None


def _libseccomp() -> Any:
    try:
        import pyseccomp
    except (ImportError, RuntimeError, OSError, AttributeError) as e:
        raise RewardError(f"libseccomp can't be loaded ({e}). {MEND}") from None
    return pyseccomp


def command(
    languages: Languages, *, filter_fd: int, info_fd: int, disk_bytes: int
) -> tuple[list[str], tuple[int, ...]]:
    """The command line that starts a sandbox, to which the command inside is appended, and the descriptors that it needs.

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
    parts += ["--proc", "/proc", "--dev", "/dev"]
    # Shared memory, and buffers of terminals, which no process is charged for.
    parts += ["--dev-bind", "/dev/null", "/dev/zero", "--dev-bind", "/dev/null", "/dev/pts/ptmx"]
    parts += ["--size", half, "--perms", "1777", "--tmpfs", "/dev/shm"]
    parts += ["--size", half, "--perms", "1777", "--tmpfs", "/tmp"]
    for folder, source in sources.items():
        parts += ["--ro-bind", source, folder]
    parts += ["--remount-ro", "/dev", "--remount-ro", "/"]
    parts += ["--chdir", "/tmp", "--clearenv", "--setenv", "PATH", PATH, "--setenv", "HOME", "/tmp"]
    return [*first, *parts, "--setenv", "LANG", "C.UTF-8", "--setenv", "OMP_NUM_THREADS", "1", "--"], fds


@lru_cache(maxsize=8)
def _stage(folders: tuple[str, ...]) -> int:
    """Under root only: a descriptor of a mount namespace that differs from ours in that folder i is at /run/i.

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


def last_line(lines: Sequence[str]) -> str:
    """The last line that is not blank."""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
