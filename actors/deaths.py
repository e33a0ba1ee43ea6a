"""What a worker died of, and how that is reported. One policy covers all kinds of worker:

died, or ended for lack of memory   replaced by its pool, later and later; in the end the run ends, with a checkpoint to resume from
controller                          the run ends; `resume` goes on
anything else                       is the worker's own error, and reported as such

Memory runs out in four ways: Ray ends a worker before the node's is full (its OutOfMemoryError, which is not a RayActorError), the
kernel kills one (a death like any other, but for the kernel's count), an allocation fails (MemoryError, torch's RuntimeError), and
a GPU's is full. The worker that is ended is often not the cause: the message names what is, and which options lower it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

Kind = Literal["died", "out of memory", "other"]
Role = Literal["learners", "engines", "reward workers", "controller", "Ray", "others"]

MEMORY_WAIT_S, LONGEST_MEMORY_WAIT_S = 2.0, 30.0
"""The wait before the first start of a worker after memory ran out, and the longest wait: others may need it only for a moment."""
OPTIONS: dict[Role, str] = {
    "learners": "learner.micro_batch_tokens, learner.logprob_chunk_tokens or learner.num_actors on one machine (on GPUs also "
    "learner.offload_optimizer, learner.offload_params, learner.zero_stage=3)",
    "engines": "rollout.kv_cache_gb, rollout.max_num_seqs or rollout.num_actors",
    "reward workers": "reward.num_actors, or what one may take, reward.memory_gb",
}
"""The options that lower a role's memory."""
GPU_OPTIONS = (
    "learner.micro_batch_tokens, rollout.gpu_memory_utilization where both share it, or use learner.offload_optimizer, "
    "learner.offload_params, learner.zero_stage=3"
)
SHARE = 0.1
"""The share of the memory in use below which a process is not considered a cause."""

CORE_DIED = "the engine core died"
"""What an actor reports whose engine core, a process of its own, was killed."""

_NO_ROOM = re.compile(
    r"MemoryError|std::bad_alloc|can't allocate memory|Cannot allocate memory|CUDA out of memory|CUDA error: out of memory"
    r"|running low on memory|HIP out of memory",
)
_ON_GPU = re.compile(r"CUDA (error: )?out of memory|HIP out of memory")
_NODE = re.compile(r"\(IP: ([^,)]+)[^)]*\).*?was ([\d.]+)\s*GB(?: used)? / ([\d.]+)\s*GB", re.S)
_WORKER = re.compile(r"\(([^()]*(?:\([^()]*\)[^()]*)*?)pid=(\d+), (?:actual )?memory used=([\d.]+)\s*GB")
_USER = re.compile(r"(?:^|[\n,])\s*(\d+)[ \t]+([\d.]+)[ \t]+([^\n,]*)")
_ROLES: tuple[tuple[str, Role], ...] = (
    (r"LearnerActor|/learner-\d", "learners"),
    (r"RolloutActor|EngineCore|/rollout-\d|^VLLM", "engines"),
    (r"RewardActor|actors\.reward\.child|/(rewards?|votes)-", "reward workers"),
    (r"Controller|/controller$", "controller"),
    (r"raylet|gcs_server|plasma|ray::IDLE|dashboard|ray/_private|RuntimeEnvAgent|DashboardAgent", "Ray"),
)


def kind_of(error: BaseException) -> Kind:
    """The kind of an error; for `died` and `out of memory` another worker may succeed."""
    if isinstance(error, OutOfMemoryError):
        return "out of memory"
    inner = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(inner, MemoryError) or type(inner).__name__ == "OutOfMemoryError":
        return "out of memory"
    if isinstance(error, RayActorError | WorkerCrashedError):
        return "out of memory" if _NO_ROOM.search(_first_lines(str(error))) else "died"
    if isinstance(inner, RuntimeError | OSError) and _NO_ROOM.search(str(inner)):
        return "out of memory"
    return "other"


def is_lost(error: BaseException) -> bool:
    """Whether the worker is gone or of no more use."""
    return kind_of(error) != "other"


def is_blameless(error: BaseException) -> bool:
    """Whether Ray chose this worker to end, whatever it was doing."""
    return isinstance(error, OutOfMemoryError)


def fate(error: BaseException, name: str, kernel: KernelKills | None = None) -> str:
    """What became of the worker `name`, as the sentence continues after its name: a line or two for users. Other errors give the
    last line of their message.

    Args:
        kernel: counts what this machine's kernel has ended for memory.
    """
    kind = kind_of(error)
    if kind == "out of memory":
        return _told_of_memory(error, name)
    inner = error.cause if isinstance(error, RayTaskError) else error
    if kernel is not None and (kind == "died" or CORE_DIED in str(inner)) and kernel.took_some():
        return killed_by_kernel(name)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def killed_by_kernel(name: str) -> str:
    return (
        f"it was killed, and the kernel has ended processes of this machine for lack of memory. Lower {_options(name)}"
    )


def _told_of_memory(error: BaseException, name: str) -> str:
    text = str(error)
    node = _NODE.search(text)
    if node is None:
        inner = error.cause if isinstance(error, RayTaskError) else error
        lines = (line.strip()[:300] for line in str(inner).splitlines() if _NO_ROOM.search(line))
        why = next(lines, type(inner).__name__)
        if _ON_GPU.search(str(inner)):
            return f"it ran out of its GPU's memory ({why}). Lower {GPU_OPTIONS}"
        return f"it ran out of memory ({why}). Lower {_options(name)}"
    where, used, size = node.group(1), float(node.group(2)), float(node.group(3))
    chosen = [line for line in text[: _users_at(text)].splitlines() if "Selected to kill" in line]
    ended = [(about, float(gb)) for about, _, gb in _WORKER.findall("\n".join(chosen))]
    own = [gb for about, gb in ended if f"/{name}" in about] or ([ended[0][1]] if len(ended) == 1 else [])
    held = f", {own[0]:.2f} of them by itself" if own else ""
    by_role = users(text)
    shares = ", ".join(f"{role} {gb:.2f}" for role, gb in by_role.most_common(4))
    most = f"; the most by {shares}" if shares else ""
    large = [r for r, gb in by_role.most_common() if r in OPTIONS and gb >= SHARE * used]
    return (
        f"Ray ended it for lack of memory: {used:.2f} of {size:.2f} GB of node {where} were in use{held}{most}.\n"
        f"Lower {'; '.join(OPTIONS[r] for r in large[:2]) or _options(name)}"
    )


def _options(name: str) -> str:
    return OPTIONS.get(_role(f"/{name}")) or "what its workers take: " + "; ".join(OPTIONS.values())


def users(text: str) -> Counter[Role]:
    """GB by role, from Ray's table of the largest processes."""
    at = _users_at(text)
    names = {pid: about for about, pid, _ in _WORKER.findall(text[:at])}
    found: Counter[Role] = Counter()
    for pid, gb, command in _USER.findall(text[at:]):
        found[_role(names.get(pid, command))] += float(gb)  # type: ignore[assignment]
    return found


class KernelKills:
    """How many processes of this machine, or of this container, the kernel has ended for lack of memory."""

    FILES = ("/proc/vmstat", "/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control")

    def __init__(self, files: Iterable[str] = FILES) -> None:
        self._files = tuple(files)
        self._seen = self._count()

    def took_some(self) -> bool:
        """Whether the kernel ended any since this object was made, or since the last call that returned True."""
        now = self._count()
        more, self._seen = now > self._seen, max(now, self._seen)
        return more

    def _count(self) -> int:
        total = 0
        for file in self._files:
            try:
                lines = Path(file).read_text().splitlines()
            except OSError:
                continue
            total += sum(int(words[1]) for line in lines if (words := line.split())[:1] == ["oom_kill"])
        return total


def memory_wait_s(number: int) -> float:
    """The wait before the `number`-th start after memory ran out, from 1 on."""
    return min(MEMORY_WAIT_S * 2.0 ** (number - 1), LONGEST_MEMORY_WAIT_S)


def _users_at(text: str) -> int:
    found = text.find("Top 10 memory users")
    return len(text) if found < 0 else found


def _role(command: str) -> Role:
    return next((role for pattern, role in _ROLES if re.search(pattern, command.strip())), "others")


def _first_lines(text: str) -> str:
    """The text without what Ray always appends for a lost worker: that memory may have been the cause."""
    return "\n".join(line for line in text.splitlines() if "Some common causes include" not in line)
