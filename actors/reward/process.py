"""The parent's end of a scoring process: start it, send it calls, kill it at a deadline with all that it left behind.

It blocks and belongs to one thread: the reward actor gives it a thread of its own (which also has to outlive the process, since
Linux ties "die with the parent" to the thread that started it).
"""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Sequence

from actors.reward.answers import decode
from actors.reward.child import Call, Setup
from actors.reward.pipe import EndedError, LateError
from actors.reward.users_process import UsersProcess
from actors.start_timeout import StartTimeout
from grpo_ray.config.reward import RewardConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.functions.function import ScoreInputs
from grpo_ray.rewards.functions.scoring import failures
from grpo_ray.types import RewardScore, ScoreStatus

START_TRIES = 3


class _KilledAtStart(RewardError):
    """The process was killed by a signal during its start."""


class _LateAtStart(RewardError):
    """The process was not ready in time."""


class ScoringProcess:
    """One long-lived child that holds the reward functions.

    Raises:
        RewardError: from `start`, and from `run` when a restart fails: a function can't be imported.
    """

    def __init__(
        self, config: RewardConfig, start_timeout_s: float = 120.0, *, with_environments: bool = False
    ) -> None:
        self._config = config
        self._with_environments = with_environments
        self._apart = not any(f.needs_host for f in config.functions)
        self._names = [f.title for f in config.functions]
        self._child = UsersProcess("actors.reward.child", config.env, apart=self._apart)
        self._pipe = self._child.pipe
        self._tag = self._child.tag
        self._stopped = False
        self._per_sample = [False] * len(config.functions)
        self._start_timeout = StartTimeout(start_timeout_s)
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._child.pid

    def start(self) -> None:
        """Start the child and wait until it has imported every function. A child killed by a signal meanwhile proves nothing about
        them: where memory is short, the kernel kills what grows. Nor does one that hangs, if they were imported before. Both
        are restarted."""
        timeout = self._start_timeout
        for left in reversed(range(START_TRIES)):
            # The last try has all the time.
            limit_s = timeout.again_s if left else timeout.limit_s
            try:
                with timeout.measured():
                    self._start_once(limit_s)
                return
            except _KilledAtStart:
                if not left:
                    raise
            except _LateAtStart:
                if not left or not timeout.longest_s:
                    raise

    def _start_once(self, limit_s: float) -> None:
        if self._stopped:
            raise RewardError("the scoring process was stopped; nothing more is scored")
        self._child.launch()
        try:
            self._await_imports(limit_s)
        except BaseException:
            self.kill()
            raise

    def _await_imports(self, limit_s: float) -> None:
        importing = "(nothing yet)"
        deadline = time.monotonic() + limit_s
        try:
            self._pipe.write(pickle.dumps(self._setup()))
            while True:
                message = self._pipe.read(deadline)
                if "refused" in message:
                    raise RewardError(str(message["refused"]))
                if message.get("ready") is True:
                    self._per_sample = [told is True for told in message["per_sample"]]
                    return
                importing = str(message.get("importing", importing))
        except LateError:
            raise _LateAtStart(
                f"reward {importing!r} was not imported within {limit_s:g} s; look for what its "
                "module does on import, or raise deadlines.start_s"
            ) from None
        except EndedError:
            how = self._child.how_it_ended()
            raise (_KilledAtStart if self._child.was_killed else RewardError)(
                f"the scoring process {how} while importing reward {importing!r}; see its log in the run's logs folder"
                f"{_hint(how)}"
            ) from None

    def _setup(self) -> Setup:
        memory_bytes = int(self._config.memory_gb * 2**30)
        search_path = tuple(p or os.getcwd() for p in sys.path)
        return Setup(self._config.functions, memory_bytes, search_path, self._apart, self._with_environments)

    def takes_whole(self, function: int) -> bool:
        """Whether the function is called with all samples of a unit at once (`reward.unit`)."""
        return self._config.unit in ("group", "batch") or (
            self._config.unit == "auto" and not self._per_sample[function]
        )

    def run(self, calls: Sequence[tuple[int, ScoreInputs]]) -> list[list[RewardScore]]:
        """Make the calls, (function index, inputs), in order; returns one result per sample for each.

        A failed call is tried again up to `on_failure.retries` times; a call past its deadline (`timeout_s` a sample)
        kills the process, and the calls after it continue in a new one.
        """
        pending = [(i, self._pack(function, inputs)) for i, (function, inputs) in enumerate(calls)]
        results: list[list[RewardScore]] = [[] for _ in calls]
        for attempt in range(1 + self._config.on_failure.retries):
            again = []
            for (i, call), result in zip(pending, self._run_once([call for _, call in pending]), strict=True):
                results[i] = result
                if any(part.status.failed for part in result):
                    again.append((i, call))
            pending = again
            if not pending or attempt == self._config.on_failure.retries:
                break
        return results

    def kill(self) -> None:
        """See `UsersProcess`."""
        self._child.kill()

    def stop(self) -> None:
        """End whatever runs, for good, from any thread. A `run` in progress raises RewardError."""
        self._stopped = True
        self._child.stop()

    def _run_once(self, calls: list[Call]) -> list[list[RewardScore]]:
        results: list[list[RewardScore]] = []
        while len(results) < len(calls):
            if self._child.pid is None:
                self.restarts += 1
                self.start()
            try:
                self._pipe.write(pickle.dumps(calls[len(results) :], protocol=pickle.HIGHEST_PROTOCOL))
                while len(results) < len(calls):
                    call = calls[len(results)]
                    message = self._pipe.read(time.monotonic() + self._limit_s(call))
                    results.append(decode(self._names[call.function], call.lengths, message))
                    if message.get("spent"):
                        self.kill()
                        break
            except (EndedError, LateError) as e:
                call = calls[len(results)]
                status, detail = self._verdict(call, e)
                self.kill()
                results.append(failures(self._names[call.function], call.count, status, detail, 0.0))
        return results

    def _limit_s(self, call: Call) -> float:
        return self._config.timeout_s * max(call.count, 1)

    def _verdict(self, call: Call, error: Exception) -> tuple[ScoreStatus, str]:
        name = self._names[call.function]
        if isinstance(error, LateError):
            return ScoreStatus.TIMEOUT, (
                f"reward {name!r} did not return within {self._limit_s(call):g} s and was killed; "
                "mend it, or raise reward.timeout_s"
            )
        how = self._child.how_it_ended()
        return ScoreStatus.CRASHED, f"the scoring process {how} during reward {name!r}{_hint(how)}"

    def _pack(self, function: int, inputs: ScoreInputs) -> Call:
        return Call(function, pickle.dumps(inputs, protocol=pickle.HIGHEST_PROTOCOL), inputs.lengths)


def _hint(how: str) -> str:
    return "; the kernel does that when memory runs out: then lower reward.num_actors" if "SIGKILL" in how else ""
