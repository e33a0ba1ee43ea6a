"""What the cluster tells -> runs, and errors for those who ask where nothing is. Whole runs: end_to_end/test_cluster.py."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import requests
import yaml

from actors.cluster import Demand, bundles, demands, misplaced, missing
from grpo_ray.config.loading import build
from grpo_ray.config.schema import RunConfig
from grpo_ray.errors import ConfigError, ResourceError
from launch.cluster.bounded_requests import BoundedAdapter, bound_requests
from launch.cluster.dashboard import RUN_KEY, Cluster, ClusterRun, check_reachable, complete, merge
from launch.cluster.in_cluster import home

ROOT = Path(__file__).parents[3]


def job(
    run: str | None, status: str, start: int, *, end: int | None = None, code: int | None = None
) -> SimpleNamespace:
    return SimpleNamespace(
        metadata={RUN_KEY: run} if run else None,
        status=status,
        start_time=start,
        end_time=end,
        submission_id=f"{run}-{start}",
        runtime_env={"working_dir": "gcs://x.zip"},
        message="",
        driver_exit_code=code,
    )


def states(runs: list[ClusterRun]) -> dict[str, str]:
    return {run.name: run.state for run in runs}


@pytest.mark.parametrize(
    ("status", "code", "state"),
    [
        ("PENDING", None, "waiting"),
        ("RUNNING", None, "running"),
        ("SUCCEEDED", 0, "finished"),
        ("FAILED", 1, "failed"),
        ("FAILED", 143, "stopped"),
        ("FAILED", 130, "stopped"),
        ("FAILED", -9, "failed"),
        ("STOPPED", None, "stopped"),
    ],
)
def test_the_state_of_a_job_and_its_exit_code_make_the_state_of_a_run(
    status: str, code: int | None, state: str
) -> None:
    assert states(merge([job("a", status, 1, code=code)], [])) == {"a": state}


def test_a_controller_without_what_drove_it_is_a_run_that_goes_on_alone() -> None:
    (run,) = merge([job("a", "FAILED", 1000, end=2000, code=-9)], ["a/controller"])
    assert (run.state, run.is_live, run.ended, run.job_id) == ("running alone", True, None, "a-1000")
    (run,) = merge([], ["b/controller", "left-over/rollout-0"])
    assert (run.name, run.state, run.job_id) == ("b", "running", None)


def test_of_a_name_that_was_used_again_the_last_job_counts_and_other_jobs_are_no_runs() -> None:
    jobs = [
        job("a", "RUNNING", 3000),
        job(None, "RUNNING", 2000),
        job("a", "FAILED", 1000, code=1),
        job("b", "SUCCEEDED", 1500),
    ]
    runs = merge(jobs, ["a/controller"])
    assert [(r.name, r.state, r.job_id, r.started) for r in runs] == [
        ("b", "finished", "b-1500", 1.5),
        ("a", "running", "a-3000", 3.0),
    ]


def test_the_workers_of_a_run_are_counted_by_the_names_of_its_actors() -> None:
    actors = ["a/controller", "a/rollout-0", "a/rollout-1.2", "a/reward-0", "a/votes-0", "a/learner-0", "b/learner-1"]
    (run,) = merge([job("a", "RUNNING", 1)], actors)
    assert run.workers == {"rollout": 2, "reward": 1, "learner": 1}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("head:8265", "http://head:8265"),
        ("http://head:8265", "http://head:8265"),
        ("https://ray.example", "https://ray.example"),
        ("head:6379", "head:6379"),
        ("auto", "auto"),
    ],
)
def test_the_dashboards_port_needs_no_scheme(given: str, meant: str) -> None:
    assert complete(given) == meant


def test_an_address_where_nothing_listens_is_told_at_once() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at http://127.0.0.1:{port}"):
        check_reachable(f"http://127.0.0.1:{port}")
    with pytest.raises(ConfigError, match="no port that is a number"):
        check_reachable("http://head:port")


def test_runs_are_written_where_all_nodes_see_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRPO_RAY_HOME", "/data")
    assert home() == Path("/data")
    assert home() / "/mine/runs" == Path("/mine/runs")
    monkeypatch.delenv("GRPO_RAY_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path


def test_the_autoscaler_is_asked_for_each_actor() -> None:
    wanted = [Demand("rollout", 2, 1, 0.5), Demand("reward", 3, 0, 0), Demand("learner", 1, 4, 0)]
    assert bundles(wanted) == [{"CPU": 1, "GPU": 0.5}, {"CPU": 1, "GPU": 0.5}, {"CPU": 4}]


def test_custom_resources_and_labels_are_asked_of_the_cluster_too() -> None:
    data = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "x"}},
        "rollout": {"num_actors": 2, "resources": {"engines": 0.5}, "labels": {"zone": "a"}},
        "reward": {"functions": [{"name": "accuracy"}], "num_cpus": 0},
        "learner": {"labels": {"zone": "!a"}},
    }
    wanted = demands(build(RunConfig, data, "test"), gpus=False)
    assert bundles(wanted) == [{"CPU": 1, "engines": 0.5}] * 2 + [{"CPU": 1}]
    assert missing(wanted, {"CPU": 3, "engines": 1}) is None
    lacking = missing(wanted, {"CPU": 3})
    assert lacking
    assert lacking.startswith("1 of the resource engines are asked for (rollout 2 x 0.5), 0 are there")
    assert misplaced(wanted, [{"zone": "a"}, {}]) is None
    lacking = misplaced(wanted, [{"zone": "a"}])
    assert lacking
    assert lacking.startswith("no node has the labels of learner.labels, {'zone': '!a'}")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    from tests.launch.test_cli import RECIPE

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def grpo_ray(place: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.run(
        [sys.executable, "-m", "launch", *args],
        cwd=place,
        env=kept | {"PYTHONPATH": str(ROOT), "HOME": str(place), "COLUMNS": "200"} | env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "code", "expected"),
    [
        (["status"], 1, "which cluster? Give --address http://HEAD:8265"),
        (
            ["submit", "recipe.yaml", "--address", "http://127.0.0.1:1"],
            1,
            "no Ray cluster answers at http://127.0.0.1:1",
        ),
        (["submit", "recipe.yaml", "learner.zero_stge=1", "--address", "x:1"], 2, "did you mean learner.zero_stage?"),
        (["submit", "recipe.yaml", "name=a b", "--address", "x:1"], 2, "name 'a b' can't be used"),
        (["submit", "smok", "--address", "x:1"], 2, "did you mean smoke"),
        (["submit", "--resume", "a", "seed", "--address", "x:1"], 2, "is not of the form key=value"),
        (["job", "stop", "a;b"], 2, "the run's name 'a;b' can't be used"),
        (["job", "stop", "a"], 1, "this command runs inside a Ray job"),
    ],
)
def test_what_cannot_be_done_is_told_in_one_message(place: Path, args: list[str], code: int, expected: str) -> None:
    result = grpo_ray(place, *args)
    assert result.returncode == code, result.stdout + result.stderr
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_a_missing_token_is_told_with_where_it_belongs(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        result = grpo_ray(place, "status", "--address", address)
    assert result.returncode == 1
    assert "Ray's token is missing" in result.stderr
    assert str(place / ".ray" / "auth_token") in result.stderr
    assert "Traceback" not in result.stderr


class Listener(BaseHTTPRequestHandler):
    """Answers nothing but 404, and keeps what it was shown: at its address, whether it was asked as a proxy, with which token."""

    shown: ClassVar[list[tuple[int, bool, str]]] = []

    def do_GET(self) -> None:
        as_proxy = self.path.startswith("http://")
        self.shown.append((self.connection.getsockname()[1], as_proxy, str(self.headers.get("Authorization"))))
        self.send_error(404)

    do_CONNECT = do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.mark.parametrize("said_by", ["option", "variable"])
def test_the_token_goes_to_the_cluster_and_to_no_proxy(place: Path, said_by: str) -> None:
    token = "0123456789abcdef" * 4
    Listener.shown.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Listener) as cluster, ThreadingHTTPServer(("", 0), Listener) as proxy:
        for server in (cluster, proxy):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        at, through = (f"http://127.0.0.1:{server.server_address[1]}" for server in (cluster, proxy))
        proxies = dict.fromkeys(("http_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"), through)
        named = {"RAY_API_SERVER_ADDRESS": at} if said_by == "variable" else {}
        args = ["--address", at] if said_by == "option" else []
        result = grpo_ray(place, "status", *args, RAY_AUTH_TOKEN=token, NO_PROXY="elsewhere.com", **proxies, **named)
        for server in (cluster, proxy):
            server.shutdown()
    assert result.returncode == 1, result.stdout + result.stderr
    assert Listener.shown
    assert {(port, as_proxy) for port, as_proxy, _ in Listener.shown} == {(cluster.server_address[1], False)}
    assert any(token in shown for _, _, shown in Listener.shown)
    assert token not in result.stdout + result.stderr


class Connections:
    """What Ray's client tells of a job's log: pieces of one connection after the other, each from the log's beginning; then
    nothing, and no end either. `breaks`: cancelled, they end in another error, as a connection may that ends at that moment."""

    def __init__(self, *of_each: list[str], breaks: bool = False) -> None:
        self._of_each = list(of_each)
        self._breaks = breaks

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        pieces = self._of_each.pop(0)
        try:
            for piece in pieces:
                yield piece
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if self._breaks:
                raise RuntimeError("closed") from None
            raise

    def get_job_status(self, job_id: str) -> SimpleNamespace:
        return SimpleNamespace(is_terminal=lambda: not self._of_each)

    def get_job_logs(self, job_id: str) -> str:
        return "step 1, step 2, step 3, the end"


def following(client: Connections) -> Cluster:
    cluster = object.__new__(Cluster)
    cluster.address, cluster._client = "http://head", client
    return cluster


PACKED = gzip.compress(bytes(1 << 25))


class Endless(BaseHTTPRequestHandler):
    """Answers without end, or all at once unpacked; trickles from /trickle."""

    def do_GET(self) -> None:
        packed = PACKED if self.path == "/packed" else b""
        self.send_response(200)
        if packed:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(packed)
            while not packed:
                self.wfile.write(b" " * (1 if self.path == "/trickle" else 1 << 20))
                time.sleep(0.01 if self.path == "/trickle" else 0)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("path", ["/endless", "/packed", "/trickle"])
def test_of_an_answer_without_end_rays_clients_read_no_more_than_they_may(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("requests.sessions.HTTPAdapter", BoundedAdapter)
    monkeypatch.setattr("launch.cluster.bounded_requests.MAX_ANSWER_BYTES", 4 << 20)
    monkeypatch.setattr("launch.cluster.bounded_requests.READ_S", 0.2 if path == "/trickle" else 600.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tracemalloc.start()
        try:
            with pytest.raises(OSError, match=r"its answer is longer than 4,194,304 bytes"):
                requests.get(f"http://127.0.0.1:{server.server_port}{path}")
            assert tracemalloc.get_traced_memory()[1] < 24 << 20
        finally:
            tracemalloc.stop()
            server.shutdown()


def test_rays_client_of_jobs_reads_by_that_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.job_submission import JobSubmissionClient

    monkeypatch.setattr("requests.sessions.HTTPAdapter", requests.sessions.HTTPAdapter)
    monkeypatch.setattr("launch.cluster.bounded_requests.MAX_ANSWER_BYTES", 4 << 20)
    bound_requests()
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(OSError, match="its answer is longer than"):
                JobSubmissionClient(f"http://127.0.0.1:{server.server_port}").list_jobs()
        finally:
            server.shutdown()


@pytest.mark.timeout(300)
def test_ctrl_c_ends_following_even_as_the_connection_ends() -> None:
    told: list[str] = []

    def tell(text: str) -> None:
        told.append(text)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()

    # A shell's background jobs are born with SIGINT ignored, and their children with them.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            following(Connections(["step 1"], breaks=True)).follow("job", tell)
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == ["step 1"]


@pytest.mark.timeout(300)
def test_a_connection_that_has_gone_quiet_is_made_again_and_nothing_is_told_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("launch.cluster.dashboard.QUIET_S", 0.2)
    told: list[str] = []
    client = Connections(["step 1, ", "ste"], ["step 1", ", step 2, "], ["step 1, step 2, step 3, "])
    following(client).follow("job", told.append)
    assert "".join(told) == "step 1, step 2, step 3, the end"
