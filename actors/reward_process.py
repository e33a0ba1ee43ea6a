"""The parent's end of a scoring process: start it, send it calls, kill it at a deadline with all that it left behind.

Blocking and for one thread: the reward actor gives it a thread of its own (which also has to outlive the process, since
Linux ties "die with the parent" to the thread that started it).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

import grpo_ray
from actors.caches import use_private_caches
from actors.reward_child import HEADER, Call, Setup
from actors.runtime import again_within
from grpo_ray.config_reward import RewardConfig
from grpo_ray.errors import RewardError
from grpo_ray.rewards.function import ScoreInputs
from grpo_ray.rewards.logs import MAX_COLUMNS, MAX_METRICS, checked_name, plain
from grpo_ray.rewards.scoring import failures
from grpo_ray.secrets import is_secret_name, resolve
from grpo_ray.types import LoggedMetric, RewardScore, ScoreStatus, Step

# What a scoring process inherits; tokens and passwords of the environment stay here. The rest comes from `reward.env`.
KEPT_ENV = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "TMPDIR", "TZ")
KEPT_FOR_HOST = ("HOME", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE")
"""Not for built-in rewards that need nothing of the host (`RewardFunctionConfig.needs_host`)."""
TAG = "GRPO_RAY_SCORER"
MAX_LINE_BYTES = 64 << 20
"""A whole group with a step at every token is some ten MiB."""
WRITE_TIMEOUT_S = 30.0
START_TRIES = 3


class _Ended(Exception):
    """The process closed its pipe, or wrote something that is no answer."""


class _Late(Exception):
    """Nothing came in time."""


class _KilledAtStart(RewardError):
    """By a signal."""


class _LateAtStart(RewardError):
    """Not ready in time."""


class ScoringProcess:
    """One long-lived child that holds the reward functions.

    Raises:
        RewardError: from `start`, and from `run` when a restart fails: a function can't be imported.
    """

    def __init__(self, config: RewardConfig, start_timeout_s: float = 120.0) -> None:
        self._config = config
        self._apart = not any(f.needs_host for f in config.functions)
        self._names = [f.title for f in config.functions]
        self._start_timeout_s = start_timeout_s
        self._tag = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._to_child = -1
        self._from_child = -1
        self._buffer = bytearray()
        self._stopped = False
        self._per_sample = [False] * len(config.functions)
        self._import_s = 0.0
        """The longest start so far; 0 before the first."""
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Start the child and wait until it has imported every function. One that a signal ends meanwhile says nothing about them:
        where memory is short, the kernel takes who grows. Nor does one that hangs, if they were imported before. Both are started
        again."""
        for left in reversed(range(START_TRIES)):
            # The last try has all the time.
            again = left > 0 and self._import_s > 0
            limit_s = self._start_timeout_s
            started = time.monotonic()
            try:
                self._start_once(again_within(self._import_s, limit_s) if again else limit_s)
            except _KilledAtStart:
                if not left:
                    raise
            except _LateAtStart:
                if not again:
                    raise
            else:
                self._import_s = max(self._import_s, time.monotonic() - started)
                return

    def _start_once(self, limit_s: float) -> None:
        if self._stopped:
            raise RewardError("the scoring process was stopped; nothing more is scored")
        request_read, self._to_child = os.pipe()
        self._from_child, response_write = os.pipe()
        os.set_blocking(self._to_child, False)
        self._buffer.clear()
        self._process = subprocess.Popen(
            # -P: the folder that it runs in is the user's, and comes last, see `search_path`.
            [
                *(sys.executable, "-P", "-X", "faulthandler"),
                *("-m", "actors.reward_child", str(request_read), str(response_write)),
            ],
            stdin=subprocess.DEVNULL,
            pass_fds=(request_read, response_write),
            start_new_session=True,
            env=self._environment(),
        )
        os.close(request_read)
        os.close(response_write)
        memory_bytes = int(self._config.memory_gb * 2**30)
        setup = Setup(self._config.functions, memory_bytes, tuple(p or os.getcwd() for p in sys.path), self._apart)
        importing = "(nothing yet)"
        deadline = time.monotonic() + limit_s
        try:
            self._write(pickle.dumps(setup))
            while True:
                message = self._read(deadline)
                if "refused" in message:
                    raise RewardError(str(message["refused"]))
                if message.get("ready") is True:
                    self._per_sample = [told is True for told in message["per_sample"]]
                    return
                importing = str(message.get("importing", importing))
        except _Late:
            raise _LateAtStart(
                f"reward {importing!r} was not imported within {limit_s:g} s; look for what its "
                "module does on import, or raise deadlines.start_s"
            ) from None
        except _Ended:
            how = self._how_it_ended()
            hint = _hint(how)
            killed = self._process is not None and (self._process.returncode or 0) < 0
            raise (_KilledAtStart if killed else RewardError)(
                f"the scoring process {how} while importing reward {importing!r}; see its log in the run's logs folder{hint}"
            ) from None
        finally:
            if sys.exc_info()[0] is not None:
                self.kill()

    def takes_whole(self, function: int) -> bool:
        """Is it called with all samples of a unit at once (`reward.unit`)?"""
        return self._config.unit in ("group", "batch") or (
            self._config.unit == "auto" and not self._per_sample[function]
        )

    def run(self, calls: Sequence[tuple[int, ScoreInputs]]) -> list[list[RewardScore]]:
        """Make the calls, (function index, inputs), in order; for each one result per sample.

        A failed call is tried again up to `on_failure.retries` times; a call past its deadline (`timeout_s` a sample)
        costs the process its life, and the calls after it go on in a new one.
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
        """End the child, its process group, and every descendant, also those in sessions of their own."""
        process, self._process = self._process, None
        for fd in (self._to_child, self._from_child):
            if fd >= 0:
                os.close(fd)
        self._to_child = self._from_child = -1
        if process is not None:
            self._end_family(process)

    def stop(self) -> None:
        """From any thread: end whatever runs, for good. A `run` under way raises RewardError."""
        self._stopped = True
        process = self._process
        if process is not None:
            self._end_family(process)

    def _end_family(self, process: subprocess.Popen[bytes]) -> None:
        if process.poll() is None:
            # Stopped first: what can't run can't fork between our looking and our killing.
            _signal([process.pid], signal.SIGSTOP)
        for _ in range(5):
            found = self._family(process.pid)
            if not found:
                break
            _signal(found, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)

    def _run_once(self, calls: list[Call]) -> list[list[RewardScore]]:
        results: list[list[RewardScore]] = []
        while len(results) < len(calls):
            if self._process is None:
                self.restarts += 1
                self.start()
            try:
                self._write(pickle.dumps(calls[len(results) :], protocol=pickle.HIGHEST_PROTOCOL))
                while len(results) < len(calls):
                    call = calls[len(results)]
                    message = self._read(time.monotonic() + self._limit_s(call))
                    results.append(_decode(self._names[call.function], call.lengths, message))
                    if message.get("spent"):
                        self.kill()
                        break
            except (_Ended, _Late) as e:
                call = calls[len(results)]
                status, detail = self._verdict(call, e)
                self.kill()
                results.append(failures(self._names[call.function], call.count, status, detail, 0.0))
        return results

    def _limit_s(self, call: Call) -> float:
        return self._config.timeout_s * max(call.count, 1)

    def _verdict(self, call: Call, error: Exception) -> tuple[ScoreStatus, str]:
        name = self._names[call.function]
        if isinstance(error, _Late):
            return ScoreStatus.TIMEOUT, (
                f"reward {name!r} did not return within {self._limit_s(call):g} s and was killed; "
                "mend it, or raise reward.timeout_s"
            )
        how = self._how_it_ended()
        return ScoreStatus.CRASHED, f"the scoring process {how} during reward {name!r}{_hint(how)}"

    def _how_it_ended(self) -> str:
        if self._process is None:
            return "is gone"
        try:
            code = self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its pipe or wrote something that is no answer"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _pack(self, function: int, inputs: ScoreInputs) -> Call:
        return Call(function, pickle.dumps(inputs, protocol=pickle.HIGHEST_PROTOCOL), inputs.lengths)

    def _environment(self) -> dict[str, str]:
        kept = KEPT_ENV if self._apart else (*KEPT_ENV, *KEPT_FOR_HOST)
        env = {k: os.environ[k] for k in kept if k in os.environ}
        paths = (str(Path(grpo_ray.__file__).parents[1]), self._config.env.get("PYTHONPATH"), env.get("PYTHONPATH"))
        # Scorers share their cores with the other actors; a thread pool in each of them would fight for them.
        env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        use_private_caches(env)
        ours = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), TAG: self._tag}
        given = {k: v for k, v in self._config.env.items() if not (self._apart and (k == "HOME" or is_secret_name(k)))}
        return env | resolve(given, os.environ) | ours

    def _write(self, body: bytes) -> None:
        data = memoryview(HEADER.pack(len(body)) + body)
        deadline = time.monotonic() + WRITE_TIMEOUT_S
        poll = select.poll()
        poll.register(self._to_child, select.POLLOUT)
        while data:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Late
            try:
                data = data[os.write(self._to_child, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise _Ended from None

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next line of the child, as JSON."""
        poll = select.poll()
        poll.register(self._from_child, select.POLLIN)
        while (end := self._buffer.find(b"\n")) < 0:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _Late
            chunk = os.read(self._from_child, 1 << 16)
            if not chunk or len(self._buffer) > MAX_LINE_BYTES:
                raise _Ended
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
        except ValueError:
            raise _Ended from None
        if not isinstance(message, dict):
            raise _Ended
        return message

    def _family(self, pid: int) -> list[int]:
        """Living processes that descend from `pid`: by parentage, and by a mark in their environment, which a process
        keeps when its parents are gone and it leads a session of its own."""
        found = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(TAG) == self._tag:
                    found.add(process.pid)
        with contextlib.suppress(psutil.Error):
            parent = psutil.Process(pid)
            family = [parent, *parent.children(recursive=True)]
            found |= {p.pid for p in family if p.status() != psutil.STATUS_ZOMBIE}
        return sorted(found)


def _hint(how: str) -> str:
    return "; the kernel does that when memory runs out: then lower reward.num_actors" if "SIGKILL" in how else ""


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _decode(name: str, lengths: Sequence[int], message: dict[str, Any]) -> list[RewardScore]:
    """Read an answer without believing it: the code that ran beside the writer is the user's."""
    try:
        scores = [
            RewardScore(
                name,
                ScoreStatus(status),
                math.nan if value is None else float(value),
                str(detail),
                float(seconds),
                tuple(Step(int(end), float(reward)) for end, reward in steps),
                *_decode_logs(*logs),
            )
            for status, value, detail, seconds, steps, *logs in message["scores"]
        ]
    except (KeyError, TypeError, ValueError):
        raise _Ended from None
    if len(scores) != len(lengths) or not all(map(_possible, scores, lengths)):
        raise _Ended
    return scores


def _decode_logs(extra: Any = (), metrics: Any = ()) -> tuple[tuple[Any, ...], tuple[LoggedMetric, ...]]:
    """Raises ValueError, TypeError."""
    pairs = tuple((checked_name(column), plain(value)) for column, value in extra)
    logged = tuple(
        LoggedMetric(checked_name(n), float(total), int(count), int(odd)) for n, total, count, odd in metrics
    )
    if len(pairs) > MAX_COLUMNS or len(logged) > MAX_METRICS or not all(math.isfinite(m.total) for m in logged):
        raise ValueError("more than a function can log")
    return pairs, logged


def _possible(score: RewardScore, length: int) -> bool:
    ends = [-1, *(step.end for step in score.steps), length]
    ok = score.status is ScoreStatus.OK
    return (
        math.isfinite(score.value) == ok
        and all(math.isfinite(step.value) for step in score.steps)
        and (not score.steps or (ok and all(a < b for a, b in pairwise(ends))))
    )
