"""A Ray cluster by `ray start`, as a user starts one, in a home and a temporary folder of its own: a head, and nodes more on the
same machine."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from tests.end_to_end.runs import RECIPE, ROOT, interruptible

START_S = 240
LIMIT_S = 480
NUM_CPUS = 4
REWARD = """
def share_of_digits(completions, **columns):
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(x.isdigit() for x in t) / max(1, len(t)) for t in texts]
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class Place:
    """A user: a home, a folder with a recipe and a reward of their own, and maybe a cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "work"
        self.home = folder / "home"
        self.runs = self.home / "runs"
        for path in (self.folder, self.home):
            path.mkdir()
        # Sockets lie below it, and their paths may have a hundred characters.
        self.tmp = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
        recipe = RECIPE | {"reward": {"functions": [{"name": "my_rewards.share_of_digits"}], "num_cpus": 0}}
        recipe["data"] = {k: v for k, v in RECIPE["data"].items() if k != "eval"}
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
        (self.folder / "my_rewards.py").write_text(REWARD)
        self.dashboard, self.metrics, self.gcs, self.agent = (free_port() for _ in range(4))
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self._head: subprocess.Popen[bytes] | None = None
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: list[subprocess.Popen[str]] = []
        self._ip = "127.0.0.1"

    def env(self) -> dict[str, str]:
        ours = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        left = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in ours}
        paths = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return left | {"HOME": str(self.home), "RAY_TMPDIR": str(self.tmp), "PATH": paths, "COLUMNS": "150"}

    def make_token(self) -> None:
        """As launch/plain/start_ray.sh does: a cluster that is started with it protects itself."""
        token = self.home / ".ray" / "auth_token"
        token.parent.mkdir()
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))

    def start_head(self, *options: str, ip: str | None = None) -> None:
        """Nothing but `ray start --head` and ports that are free: no word about tokens. Its code is the image's, not ours.

        `ip`: of the interface that other nodes reach it by.
        """
        ports = [f"--port={self.gcs}", f"--dashboard-port={self.dashboard}", f"--metrics-export-port={self.metrics}"]
        ports += [f"--dashboard-agent-listen-port={self.agent}", f"--ray-client-server-port={free_port()}"]
        sizes = [f"--num-cpus={NUM_CPUS}", "--object-store-memory=300000000", "--disable-usage-stats", *options]
        if ip is not None:
            self._ip = ip
            sizes.append(f"--node-ip-address={ip}")
        with open(self.tmp / "head.log", "wb") as log:
            self._head = subprocess.Popen(
                ["ray", "start", "--head", "--block", *ports, *sizes, f"--temp-dir={self.tmp}"],
                env=self.env(),
                cwd=self.tmp,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while True:
            assert self._head.poll() is None, (self.tmp / "head.log").read_text()
            assert time.monotonic() < deadline, (self.tmp / "head.log").read_text()
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", self.dashboard)) == 0:
                    return
            time.sleep(0.2)

    def add_node(
        self, name: str, num_cpus: float, *, within: Sequence[str] = (), ip: str = "", **resources: float
    ) -> None:
        """A raylet more, with the label `site: NAME`. `within`: a command that runs it elsewhere, where it has the address `ip`."""
        options = [f"--num-cpus={num_cpus:g}", f"--labels=site={name}", f"--resources={json.dumps(resources)}"]
        # Its own folder, as on a machine of its own: nodes that share one unpack a job's code over each other.
        options += [
            f"--temp-dir={self.tmp / name}",
            f"--metrics-export-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
            *([f"--node-ip-address={ip}"] if ip else []),
        ]
        with open(self.tmp / f"{name}.log", "wb") as log:
            self._nodes[name] = subprocess.Popen(
                [
                    *within,
                    "ray",
                    "start",
                    f"--address={self._ip}:{self.gcs}",
                    "--block",
                    "--object-store-memory=150000000",
                    *options,
                ],
                # A node has to show the token; see the README.
                env=self.env() | {"RAY_AUTH_MODE": "token"},
                cwd=self.tmp,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill_node(self, name: str) -> None:
        """All of its processes at once, as a power cut does."""
        node = self._nodes.pop(name)
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        node.wait(30)

    def drain_node(self, name: str, seconds: float) -> None:
        """What a cloud's notice that a spot instance ends in so many seconds leads to."""
        node_id = next(i for i, site in self.nodes().items() if site == name)
        options = [
            f"--address={self._ip}:{self.gcs}",
            f"--node-id={node_id}",
            f"--deadline-remaining-seconds={seconds:g}",
        ]
        options += ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot"]
        subprocess.run(
            ["ray", "drain-node", *options],
            env=self.env() | {"RAY_AUTH_MODE": "token"},
            check=True,
            timeout=60,
        )

    def has_ended(self, name: str) -> bool:
        """Has a node that was added ended by itself?"""
        return self._nodes[name].poll() is not None

    def nodes(self) -> dict[str, str]:
        """Id of each living node -> its site; the head has none."""
        return {n["node_id"]: (n["labels"] or {}).get("site", "") for n in self.ask("nodes") if n["state"] == "ALIVE"}

    def ask(self, what: str) -> list[dict[str, Any]]:
        """Of Ray's state API: `nodes`, `actors`."""
        token = self.home / ".ray" / "auth_token"
        headers = {"Authorization": f"Bearer {token.read_text()}"} if token.is_file() else {}
        request = urllib.request.Request(f"{self.address}/api/v0/{what}?detail=1&limit=1000", headers=headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: list[dict[str, Any]] = json.load(answer)["data"]["result"]["result"]
        return found

    def where(self, run: str) -> dict[str, str]:
        """Living actor of a run -> the site of its node."""
        sites = self.nodes()
        alive = (a for a in self.ask("actors") if a["state"] == "ALIVE" and (a["name"] or "").startswith(f"{run}/"))
        return {a["name"].removeprefix(f"{run}/"): sites[a["node_id"]] for a in alive}

    def begin(self, *args: str) -> subprocess.Popen[str]:
        """`grpo-ray ARGS` in the user's folder."""
        with interruptible():
            process = subprocess.Popen(
                [sys.executable, "-m", "launch", *args],
                cwd=self.folder,
                env=self.env() | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def run(self, *args: str, limit_s: float = LIMIT_S) -> tuple[int, str]:
        process = self.begin(*args)
        output, _ = process.communicate(timeout=limit_s)
        return process.returncode, output

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        for name in list(self._nodes):
            self.kill_node(name)
        if self._head is not None and self._head.poll() is None:
            self._head.send_signal(signal.SIGTERM)
            try:
                self._head.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(self._head.pid, signal.SIGKILL)
        shutil.rmtree(self.tmp, ignore_errors=True)
