"""Whom chaos strikes, and how: processes of one run, found below the run's own."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass
from signal import SIGKILL, SIGSTOP

import psutil

from tests.chaos.processes import family, title

# A learner or an engine that hangs is noticed at its deadline, a silent reward actor after a minute.
NUM_STEPS = 12
OVERRIDES = (
    f"num_steps={NUM_STEPS}",
    "checkpoint.every_steps=2",
    "deadlines.update_s=20",
    "deadlines.sync_s=20",
    "deadlines.save_s=20",
)
FIND_S = 90.0
"""A victim that is just being replaced is waited for."""


@dataclass(frozen=True)
class Victim:
    title: str
    """Of its process: a regular expression for its command line, or empty for the command that the user gave."""
    signal: signal.Signals
    told: str = ""
    """What the run says of it, a regular expression; empty where it need not say anything."""
    ends_run: bool = False
    """The run has to be resumed."""
    noticed_s: float = 0.0
    """The deadline by which the run knows, under OVERRIDES."""


VICTIMS = {
    "a learner": Victim(r"^ray::.*\bLearnerActor\b", SIGKILL, "learner-0 died"),
    "a learner that hangs": Victim(r"^ray::.*\bLearnerActor\b", SIGSTOP, "learner-0 did not finish", noticed_s=20),
    "an engine": Victim("^VLLM::EngineCore", SIGKILL, "rollout-0"),
    "an engine that hangs": Victim("^VLLM::EngineCore", SIGSTOP, "rollout-0", noticed_s=30),
    "a rollout actor": Victim(r"^ray::.*\bRolloutActor\b", SIGKILL, "rollout-0"),
    "a rollout actor that hangs": Victim(r"^ray::.*\bRolloutActor\b", SIGSTOP, "rollout-0", noticed_s=30),
    "a reward actor": Victim(r"^ray::.*\bRewardActor\b", SIGKILL),
    "a reward actor that hangs": Victim(r"^ray::.*\bRewardActor\b", SIGSTOP, "reward-0 did not answer", noticed_s=70),
    "a reward function's process": Victim(r"-m actors\.reward\.child", SIGKILL),
    "a reward function's process that hangs": Victim(r"-m actors\.reward\.child", SIGSTOP, noticed_s=10),
    "the controller": Victim(r"^ray::.*\bController\b", SIGKILL, "grpo-ray resume", ends_run=True),
    "a controller that hangs": Victim(
        r"^ray::.*\bController\b", SIGSTOP, "did not answer for 60 s; `grpo-ray resume", ends_run=True
    ),
    "the command": Victim("", SIGKILL, ends_run=True),
}


def find(root: int, victim: Victim) -> list[psutil.Process]:
    """Whom it may strike now: what was stopped before is about to be replaced."""
    if not victim.title:
        return [psutil.Process(root)]
    return [p for p in family(root) if re.search(victim.title, title(p)) and not _is_stopped(p)]


def _is_stopped(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def strike(root: int, victim: Victim) -> int | None:
    """Send its signal to one of the processes below `root`. The pid; None: there is none such within FIND_S."""
    deadline = time.monotonic() + FIND_S
    while time.monotonic() < deadline and _lives(root):
        for process in find(root, victim):
            try:
                process.send_signal(victim.signal)
            except psutil.NoSuchProcess:
                continue
            return process.pid
        time.sleep(0.05)
    return None
