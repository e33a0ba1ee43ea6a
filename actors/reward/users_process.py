"""A process of users' code and its pipes: launched without our secrets, ended with all that it left behind.

It blocks and belongs to one thread, which has to outlive it, since Linux ties "die with the parent" to the thread that started it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path

import grpo_ray
from actors.caches import use_private_caches
from actors.devices import VISIBLE
from actors.reward.family import TAG, end_family
from actors.reward.pipe import ChildPipe
from grpo_ray.secrets import is_secret_name, resolve

# What such a process inherits; tokens and passwords of the environment stay here. The rest comes from `env`.
KEPT_ENV = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR", "TZ", VISIBLE)
KEPT_FOR_HOST = ("HOME", "HF_HOME", "HF_HUB_OFFLINE")
"""The variables that built-in rewards do not get where they need nothing of the host (`RewardFunctionConfig.needs_host`)."""


class UsersProcess:
    """One process at a time that runs `module` at the far end of `pipe`."""

    def __init__(self, module: str, env: Mapping[str, str], *, apart: bool) -> None:
        """
        Args:
            env: further variables, which may refer to secrets.
            apart: whether it gets neither HOME nor secrets.
        """
        self._module = module
        self._env = env
        self._apart = apart
        self.tag = uuid.uuid4().hex
        self.pipe = ChildPipe()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def was_killed(self) -> bool:
        """Whether it ended by a signal, once `how_it_ended` has been asked."""
        return self._process is not None and (self._process.returncode or 0) < 0

    def launch(self) -> None:
        reads, writes = ends = self.pipe.open()
        self._process = subprocess.Popen(
            # -P: the working folder is the user's, and comes last, see `search_path`.
            [*(sys.executable, "-P", "-X", "faulthandler"), *("-m", self._module, str(reads), str(writes))],
            stdin=subprocess.DEVNULL,
            pass_fds=ends,
            start_new_session=True,
            env=self.environment(),
        )
        for end in ends:
            os.close(end)

    def kill(self) -> None:
        """End the process, its process group, and every descendant, also those in sessions of their own."""
        process, self._process = self._process, None
        self.pipe.close()
        if process is not None:
            end_family(process, self.tag)

    def stop(self) -> None:
        """End whatever runs, from any thread; the thread that it belongs to still has to `kill` it."""
        process = self._process
        if process is not None:
            end_family(process, self.tag)

    def how_it_ended(self) -> str:
        """How the process ended, as the end of a sentence."""
        if self._process is None:
            return "is gone"
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its pipe or wrote something that is no answer"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def environment(self) -> dict[str, str]:
        """Its environment variables."""
        kept = KEPT_ENV if self._apart else (*KEPT_ENV, *KEPT_FOR_HOST)
        env = {k: os.environ[k] for k in kept if k in os.environ}
        paths = (str(Path(grpo_ray.__file__).parents[1]), self._env.get("PYTHONPATH"), env.get("PYTHONPATH"))
        # Such workers share their cores with the other actors; a thread pool in each of them would compete for them.
        env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        use_private_caches(env)
        ours = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), TAG: self.tag}
        given = {k: v for k, v in self._env.items() if not (self._apart and (k == "HOME" or is_secret_name(k)))}
        return env | resolve(given, os.environ) | ours
