"""A node is cut from the network, and the run goes on without it: a raylet with a rollout actor in a network namespace of its own,
whose only link is taken down and up again. Needs root and `ip` (Debian: iproute2).

make chaos
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.cluster import controller_name
from tests.bench.simulated import oldest_trained
from tests.chaos.processes import adopt_orphans, end, left_behind, living
from tests.end_to_end.clusters import Place
from tests.end_to_end.runs import metrics
from tests.end_to_end.test_scale import await_step, await_workers, check_ledger, is_live, steps, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NEAR, FAR = "10.213.77.1", "10.213.77.2"
SHORT_S = 8.0
END_S = 30.0
AT_DEADLINE_S = 90.0
"""The longest that a step may take while the link is down, but for the work itself: a sync's deadline, and a probe's before it."""


class Link:
    """A network namespace, joined to this one as a machine is to its switch: a bridge here, and a cable from it to there. What
    both ends see of a cable that is pulled is that nothing arrives any more."""

    def __init__(self) -> None:
        name = f"grpo{os.getpid() % 100000}"
        self.namespace, self._bridge, self._port, self._there = name, f"{name}s", f"{name}a", f"{name}b"

    def make(self) -> None:
        """Raises CalledProcessError where this is not permitted."""
        ip("netns", "add", self.namespace)
        for command in (
            f"link add {self._bridge} type bridge",
            f"addr add {NEAR}/30 dev {self._bridge}",
            f"link set {self._bridge} up",
            f"link add {self._port} type veth peer name {self._there}",
            f"link set {self._there} netns {self.namespace}",
            f"link set {self._port} master {self._bridge}",
            f"link set {self._port} up",
            f"-n {self.namespace} addr add {FAR}/30 dev {self._there}",
            f"-n {self.namespace} link set lo up",
            f"-n {self.namespace} link set {self._there} up",
            # All addresses of the head's machine are behind it.
            f"-n {self.namespace} route add default via {NEAR}",
        ):
            ip(*command.split())

    def down(self) -> None:
        ip("link", "set", self._port, "down")

    def up(self) -> None:
        ip("link", "set", self._port, "up")

    def remove(self) -> None:
        for command in (f"link del {self._port}", f"link del {self._bridge}", f"netns del {self.namespace}"):
            subprocess.run(["ip", *command.split()], capture_output=True, timeout=30)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    if shutil.which("ip") is None:
        pytest.skip("`ip` is not there (Debian: apt-get install iproute2)")
    link = Link()
    try:
        try:
            link.make()
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces are not permitted here: {e.stderr.decode().strip()}")
        yield link
    finally:
        link.remove()


@pytest.fixture(scope="module")
def place(link: Link, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A head with one engine's resources, and another node behind the link with as much."""
    adopt_orphans()
    before = {p.pid for p in living()}
    place = Place(tmp_path_factory.mktemp("place"))
    try:
        place.make_token()
        place.start_head('--resources={"engines": 1}', "--labels=site=near", ip=NEAR)
        add_far(place, link)
        yield place
    finally:
        place.close()
        found = left_behind(END_S, before)
        end(living(before))
        assert found == []


def add_far(place: Place, link: Link) -> None:
    place.add_node("far", 1, within=["ip", "netns", "exec", link.namespace], ip=FAR, engines=1)
    wait_for(lambda: sorted(place.nodes().values()) == ["far", "near"], "the far node does not join")


def submit(place: Place, name: str, *options: str) -> Path:
    options = (
        "num_steps=100000",
        "rollout.num_actors=2",
        "rollout.resources={engines: 1}",
        "learner.labels={site: near}",
        "reward.labels={site: near}",
        "checkpoint.every_steps=1000",
        "learner.learning_rate=1e-5",
        "deadlines.sync_s=20",
        *options,
    )
    code, output = place.run("submit", "tiny.yaml", f"name={name}", *options, "--no-wait", "--address", place.address)
    assert code == 0, output
    run = place.runs / name
    await_step(run, 2)
    assert sorted(s for who, s in place.where(name).items() if "rollout" in who) == ["far", "near"]
    return run


def check_end(place: Place, name: str, staleness: int) -> None:
    run = place.runs / name
    assert place.run("stop", name, "--address", place.address)[0] == 0
    wait_for(lambda: not is_live(place, name), "it does not end", run)
    check_ledger(run)
    assert oldest_trained(run / "ledger.sqlite") <= staleness
    assert max(m["staleness/max"] for m in metrics(run)) <= staleness


def longest_step_s(run: Path, first: int) -> float:
    return max(m["time/step"] for m in steps(run)[first:])


def is_there(place: Place, site: str) -> bool:
    return site in place.nodes().values()


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_goes_on_without_a_node_that_is_cut_off_and_with_it_when_it_is_back(
    place: Place, link: Link, staleness: int
) -> None:
    name = f"cut-{staleness}"
    run = submit(place, name, f"algorithm.max_staleness={staleness}")
    before = len(steps(run))
    link.down()
    began = time.monotonic()
    try:
        await_step(run, before + 5)
        print(f"5 steps {time.monotonic() - began:.1f} s after the cut, staleness {staleness}")
        wait_for(lambda: not is_there(place, "far"), "Ray does not notice", run)
        print(f"Ray took the node for dead after {time.monotonic() - began:.1f} s")
        await_step(run, len(steps(run)) + 5)
    finally:
        link.up()
    assert longest_step_s(run, before) < AT_DEADLINE_S
    assert controller_name(name) in {a["name"] for a in place.ask("actors") if a["state"] == "ALIVE"}
    await_step(run, len(steps(run)) + 5)
    # Its raylet has heard that it was given up, and has ended; who runs the cluster starts it again.
    wait_for(lambda: place.has_ended("far"), "the far node's raylet does not end", run)
    place.kill_node("far")
    add_far(place, link)
    wait_for(lambda: steps(run)[-1]["sync/engines"] == 2, "the engine does not come back", run)
    await_workers(run, "rollout", 2)
    check_end(place, name, staleness)


def test_a_cut_that_is_shorter_than_rays_patience_costs_no_worker(place: Place, link: Link) -> None:
    run = submit(place, "short")
    before = place.where("short")
    first = len(steps(run))
    link.down()
    time.sleep(SHORT_S)
    link.up()
    await_step(run, first + 10)
    assert steps(run)[-1]["sync/engines"] == 2
    assert place.where("short") == before
    check_end(place, "short", 0)
