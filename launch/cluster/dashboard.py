"""A running Ray cluster as the command line sees it: over its dashboard's HTTP alone, so from anywhere that reaches that port."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import queue
import shlex
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from actors.addresses import EVERYWHERE, bypass_proxies
from actors.cluster import NAMESPACE, check_token
from grpo_ray.config.scaling import SCALED
from grpo_ray.errors import ConfigError, ResourceError, WorkerError, first_line
from grpo_ray.names import check_name

DASHBOARD_PORT = 8265
REACH_S = 10.0
COMMAND_S = 180.0
"""The time limit of a command inside the cluster: a process that imports Ray, on a busy head."""
LOST_S = 120.0
"""How long the log of a job may be out of reach before following it gives up."""
QUIET_S = 60.0
"""The time after which a connection without data is replaced: it may be cut, and would never report it."""
RUN_KEY = "grpo_ray_run"
"""The key in a job's metadata for the run that it drives."""
STOPPED_EXITS = (130, 143)
MAX_ACTORS = 10_000
"""The number of actors that Ray lists at once."""
T = TypeVar("T")


@dataclass(frozen=True)
class ClusterRun:
    """A run as the cluster reports it."""

    name: str
    state: str
    """waiting, running, finished, stopped, failed; `running alone`: the driver has exited; the controller is still running."""
    job_id: str | None
    """The id of the job that drives the run; None: it was not submitted, or its driver was not a job."""
    started: float | None = None
    """The start of the run, in seconds since the epoch."""
    ended: float | None = None
    working_dir: str | None = None
    message: str = ""
    exit_code: int | None = None
    workers: Mapping[str, int] = field(default_factory=dict)
    """Role -> the number of its workers; roles as in `grpo_ray.config.scaling`."""

    @property
    def is_live(self) -> bool:
        return self.state in ("waiting", "running", "running alone")


def merge(jobs: Iterable[Any], actors: Iterable[str]) -> list[ClusterRun]:
    """The runs, the oldest first, from Ray's jobs and the names of live actors; of a name that was used twice, the last."""
    runs: dict[str, ClusterRun] = {}
    for job in sorted(jobs, key=lambda j: j.start_time or 0):
        name = (job.metadata or {}).get(RUN_KEY)
        if name is not None:
            runs.pop(name, None)
            runs[name] = _of_job(name, job)
    workers: dict[str, Counter[str]] = {}
    for actor in actors:
        run_of, _, who = actor.rpartition("/")
        workers.setdefault(run_of, Counter())[who.partition("-")[0]] += 1
    for name, count in workers.items():
        if not count["controller"]:
            continue
        run = runs.get(name)
        if run is None:
            runs[name] = ClusterRun(name, "running", None)
        elif not run.is_live:
            runs[name] = replace(run, state="running alone", ended=None)
        runs[name] = replace(runs[name], workers={role: count[role] for role in SCALED if count[role]})
    return list(runs.values())


def _of_job(name: str, job: Any) -> ClusterRun:
    state = {"PENDING": "waiting", "RUNNING": "running", "SUCCEEDED": "finished", "STOPPED": "stopped"}.get(
        str(job.status), "stopped" if job.driver_exit_code in STOPPED_EXITS else "failed"
    )
    return ClusterRun(
        name,
        state,
        job.submission_id,
        job.start_time and job.start_time / 1000,
        job.end_time and job.end_time / 1000,
        (job.runtime_env or {}).get("working_dir"),
        job.message or "",
        job.driver_exit_code,
    )


class Cluster:
    def __init__(self, address: str | None) -> None:
        """
        Args:
            address: `http://HOST:8265`, HOST:6379 (of Ray's head) or `auto`; None: the one in the environment.

        Raises:
            ResourceError: nothing answers there, or it refuses our token.
        """
        said = ((source, os.environ.get(source)) for source in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"))
        source, where = next(((s, w) for s, w in (("--address", address), *said) if w), ("", None))
        if not where:
            raise ResourceError(
                f"which cluster? Give --address http://HEAD:{DASHBOARD_PORT} (KubeRay: kubectl port-forward "
                f"service/CLUSTER-head-svc {DASHBOARD_PORT}), or set RAY_ADDRESS"
            )
        self.address = complete(where)
        check_reachable(self.address, source)
        check_token()
        import ray
        from ray.job_submission import JobSubmissionClient

        from launch.cluster.bounded_requests import bound_requests

        bound_requests()
        # In Ray the environment overrides the argument.
        os.environ["RAY_API_SERVER_ADDRESS"] = self.address
        logging.getLogger("ray").setLevel(logging.WARNING)
        try:
            self._client = JobSubmissionClient(self.address)
            self._client.list_jobs()
        except ray.exceptions.AuthenticationError as e:
            raise ResourceError(
                f"the cluster at {self.address} does not take our token ({first_line(e)}): it must be the one that its "
                "head was started with, in ~/.ray/auth_token or RAY_AUTH_TOKEN"
            ) from None
        except (ConnectionError, ValueError, RuntimeError, OSError) as e:
            raise ResourceError(
                f"no Ray cluster answers at {self.address} (from {source}): {e}; is its head started?"
            ) from None

    def runs(self) -> list[ClusterRun]:
        from ray.util.state import list_actors

        living = [("state", "=", "ALIVE")]
        actors = self._ask(list_actors, self._client.get_address(), filters=living, limit=MAX_ACTORS)
        names = [a.name for a in actors if a.ray_namespace in (NAMESPACE, None) and a.name]
        return merge(self._ask(self._client.list_jobs), names)

    def find(self, name: str) -> ClusterRun:
        """The run of this name; raises ConfigError when the cluster has none."""
        check_name(name, "the run's name")
        runs = self.runs()
        for run in runs:
            if run.name == name:
                return run
        from launch.cluster.in_cluster import no_such_run

        raise ConfigError(no_such_run(name, [r.name for r in runs]))

    def submit(self, name: str, words: list[str], working_dir: str) -> str:
        """Start `python -m launch job WORDS` in a copy of this folder; returns the job's id."""
        return str(
            self._ask(
                self._client.submit_job,
                entrypoint=_entrypoint(words),
                submission_id=f"{name}-{uuid.uuid4().hex[:6]}",
                runtime_env={"working_dir": working_dir},
                metadata={RUN_KEY: name},
            )
        )

    def command(
        self, words: list[str], run: ClusterRun, tell: Callable[[str], None], limit_s: float = math.inf
    ) -> None:
        """Run a command about a run as a job with that run's own code: follow it to its end, and leave no trace.

        Raises:
            ResourceError: the command has not ended within `limit_s`.
            WorkerError: the command failed; with its message. SystemExit for a run that was stopped while the command followed it.
        """
        job = self._ask(
            self._client.submit_job,
            entrypoint=_entrypoint(words),
            submission_id=f"grpo-ray-{words[0]}-{uuid.uuid4().hex[:6]}",
            runtime_env={"working_dir": run.working_dir} if run.working_dir else {},
        )
        try:
            self.follow(job, tell, limit_s)
            details = self._ask(self._client.get_job_info, job)
            if details.driver_exit_code in STOPPED_EXITS:
                raise SystemExit(details.driver_exit_code)
            if str(details.status) != "SUCCEEDED":
                raise WorkerError(f"`{words[0]}` of {run.name} failed on the cluster: {details.message}")
        finally:
            self._ask(self._forget, job)

    def log(self, job_id: str) -> str:
        return str(self._ask(self._client.get_job_logs, job_id))

    def follow(self, job_id: str, tell: Callable[[str], None], limit_s: float = math.inf) -> None:
        """Pass the log of a job to `tell` until the job has ended; a broken connection is replaced.

        Raises:
            ResourceError: the cluster did not answer for LOST_S, or the job has not ended within `limit_s`.
        """
        passed = 0
        give_up = time.monotonic() + limit_s
        lost_since = None
        while True:
            try:
                for text in self._tail(job_id, passed, give_up):
                    passed += len(text)
                    tell(text)
                if time.monotonic() > give_up:
                    raise ResourceError(f"job {job_id} on {self.address} has not ended within {limit_s:g} s")
                if self._client.get_job_status(job_id).is_terminal():
                    tell(self._client.get_job_logs(job_id)[passed:])
                    return
                lost_since = None
            except (OSError, RuntimeError) as e:
                lost_since = lost_since or time.monotonic()
                if time.monotonic() - lost_since > LOST_S:
                    raise ResourceError(
                        f"the cluster at {self.address} has not answered for {LOST_S:g} s ({e}); the run may well go on there"
                    ) from None
            time.sleep(0.5)

    def _tail(self, job_id: str, passed: int, give_up: float) -> Iterator[str]:
        """The log of a job from character `passed` on, until the connection ends.

        It is read in a thread: an event loop here would take a Ctrl-C for itself, and lose it where cancelling what it waits for
        ends in another error.
        """
        texts: queue.SimpleQueue[str | Exception | None] = queue.SimpleQueue()

        async def read() -> None:
            seen = 0
            stream = aiter(self._client.tail_job_logs(job_id))
            while (
                text := await asyncio.wait_for(anext(stream, None), min(QUIET_S, give_up - time.monotonic()))
            ) is not None:
                seen += len(text)
                if seen > passed:
                    texts.put(text[-min(len(text), seen - passed) :])

        def run() -> None:
            end = None
            try:
                with contextlib.suppress(TimeoutError):
                    asyncio.run(read())
            except Exception as e:
                end = e
            finally:
                texts.put(end)

        threading.Thread(target=run, name=f"log of {job_id}", daemon=True).start()
        while (text := texts.get()) is not None:
            if isinstance(text, Exception):
                raise text
            yield text

    def _ask(self, what: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call Ray; raises ResourceError when the cluster does not answer, or refuses."""
        from ray.util.state.exception import RayStateApiException

        try:
            return what(*args, **options)
        except (OSError, RuntimeError, RayStateApiException) as e:
            raise ResourceError(f"the cluster at {self.address} does not do what it is asked to: {e}") from None

    def _forget(self, job_id: str) -> None:
        if self._client.get_job_status(job_id).is_terminal():
            self._client.delete_job(job_id)
        else:
            self._client.stop_job(job_id)


def complete(address: str) -> str:
    """The address with its defaults filled in: HOST:8265 means the dashboard."""
    return f"http://{address}" if address.endswith(f":{DASHBOARD_PORT}") and "://" not in address else address


def check_reachable(address: str, source: str = "--address") -> None:
    """Raise ResourceError at once where Ray's own clients would try for minutes. From now on nothing that this process sends goes
    to a proxy: Ray finds the dashboard by itself, and shows it the token.

    Args:
        source: the option or environment variable that names the address.
    """
    told = f"{address} (from {source})"
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        port = parts.port or {"https": 443, "http": 80}.get(parts.scheme)
    except ValueError:
        raise ConfigError(f"{told} has no port that is a number; it reads http://HEAD:{DASHBOARD_PORT}") from None
    bypass_proxies([EVERYWHERE])
    if parts.hostname is None or port is None:
        return
    try:
        socket.create_connection((parts.hostname, port), timeout=REACH_S).close()
    except (OSError, UnicodeError) as e:
        raise ResourceError(
            f"no Ray cluster answers at {told}: {e}; is its head started, and its port {port} within reach?"
        ) from None


def _entrypoint(words: list[str]) -> str:
    return shlex.join(["python", "-m", "launch", "job", *words])
