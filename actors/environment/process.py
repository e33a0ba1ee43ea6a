"""The parent's end of a process of environments: start it, make one call after the other, kill it at a deadline.

It blocks and belongs to one thread, as `UsersProcess` does.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
import time
from typing import Any

from actors.environment.messages import Leave, Request, Setup
from actors.reward.pipe import EndedError, LateError
from actors.reward.users_process import UsersProcess
from grpo_ray.config.environment import EnvironmentConfig
from grpo_ray.config.reward import RewardFunctionConfig
from grpo_ray.episodes.episode import EnvironmentFailedError
from grpo_ray.errors import RewardError
from grpo_ray.types import ScoreStatus

LEAVE_S = 5.0
"""The time to close instances in, before the process is killed."""


class EnvironmentProcess:
    """One child that holds instances. One that was killed is started again by the next call."""

    def __init__(
        self, config: EnvironmentConfig, functions: tuple[RewardFunctionConfig, ...], start_timeout_s: float
    ) -> None:
        self._config = config
        self._functions = functions
        self._start_timeout_s = start_timeout_s
        self._child = UsersProcess("actors.environment.child", config.env, apart=False)
        self.life = 0
        """The number of the present child: whoever began in another has lost its instance."""

    @property
    def pid(self) -> int | None:
        return self._child.pid

    @property
    def tag(self) -> str:
        """The mark of the process and all that it starts."""
        return self._child.tag

    def start(self) -> None:
        """Start the child, and wait until it has imported every class.

        Raises:
            RewardError: naming the class that can't be imported.
        """
        self._child.launch()
        deadline = time.monotonic() + self._start_timeout_s
        search_path = tuple(p or os.getcwd() for p in sys.path)
        try:
            self._child.pipe.write(pickle.dumps(Setup(self._config, self._functions, search_path)))
            message = self._child.pipe.read(deadline)
        except LateError:
            self.kill()
            raise RewardError(
                f"environments were not imported within {self._start_timeout_s:g} s; look for what their modules do on import, or "
                "raise deadlines.start_s"
            ) from None
        except EndedError:
            how = self._child.how_it_ended()
            self.kill()
            raise RewardError(f"the process of environments {how} while importing them; see its worker's log") from None
        if "refused" in message:
            self.kill()
            raise RewardError(str(message["refused"]))

    def call(self, request: Request, limit_s: float, option: str) -> dict[str, Any]:
        """Make one call.

        Args:
            option: the deadline's option, for the error.

        Raises:
            EnvironmentFailedError: the call raised, was late, or ended the process, which is killed then.
            RewardError: the process can't be started again.
        """
        what = type(request).__name__.lower()
        try:
            self._child.pipe.write(pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL))
            message = self._child.pipe.read(time.monotonic() + limit_s)
        except LateError:
            self.kill()
            told = f"the environment's {_NAMES.get(what, what)} did not return within {limit_s:g} s and was killed"
            raise EnvironmentFailedError(
                ScoreStatus.TIMEOUT, f"{told}; mend it, or raise environment.{option}"
            ) from None
        except EndedError:
            how = self._child.how_it_ended()
            self.kill()
            raise EnvironmentFailedError(
                ScoreStatus.CRASHED, f"the process of the environment {how} during {_NAMES.get(what, what)}"
            ) from None
        if "raised" in message:
            raise EnvironmentFailedError(
                ScoreStatus.ERROR, f"the environment's {_NAMES.get(what, what)} raised {message['raised']}"
            )
        return message

    def kill(self) -> None:
        """End the child with all that it started; its instances are lost."""
        self.life += 1
        self._child.kill()

    def stop(self) -> None:
        """End whatever runs, from any thread."""
        self._child.stop()

    def leave(self) -> None:
        """Let the child close its instances, and end it."""
        if self.pid is not None:
            with contextlib.suppress(EnvironmentFailedError):
                self.call(Leave(), LEAVE_S, "step_timeout_s")
        self.kill()


_NAMES = {"begin": "reset", "tooluse": "tool", "end": "rewards", "leave": "close"}
"""Requests by the names that users know."""
