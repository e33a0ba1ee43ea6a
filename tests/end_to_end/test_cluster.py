"""Runs on a cluster that `ray start --head` made: submitted, followed, left alone, stopped and resumed."""

from __future__ import annotations

import os
import re
import signal
import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from grpo_ray.telemetry.prometheus import series
from tests.end_to_end.clusters import Place
from tests.end_to_end.runs import ledger, metrics

pytestmark = pytest.mark.timeout(900)
LIMIT_S = 300


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


def wait_for(what: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not what():
        assert time.monotonic() < deadline, why
        time.sleep(0.2)


def num_steps(run: Path) -> int:
    return len(metrics(run)) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.slow
def test_who_ran_on_this_machine_first_can_submit_to_a_cluster_started_afterwards(place: Place) -> None:
    """A local run leaves a token in the home, with which every Ray started later protects itself."""
    code, output = place.run("train", "tiny.yaml", "name=local", "data.train.path=gone.jsonl")
    assert code == 1, output
    assert "gone.jsonl" in output
    token = place.home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    place.start_head()
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{place.address}/api/jobs/", timeout=10)
    code, output = place.run("submit", "tiny.yaml", "name=first", "--address", place.address)
    assert code == 0, output
    run = place.runs / "first"
    assert "step 6/6" in output
    assert "grpo-ray logs first" in output
    assert num_steps(run) == 6
    assert [row[2] for row in ledger(run)] == ["trained"] * 24
    assert not (place.folder / "runs" / "first").exists()
    secret = token.read_text().strip()
    assert len(secret) > 20
    told = [p for p in run.rglob("*") if p.is_file() and secret.encode() in p.read_bytes()]
    assert told == []
    assert secret not in output
    code, output = place.run("status", "--address", place.address)
    assert code == 0
    assert "finished" in next(line for line in output.splitlines() if line.startswith("first"))


@pytest.mark.slow
def test_a_run_outlives_all_who_watch_it_and_ends_when_told(place: Place) -> None:
    place.make_token()
    place.start_head()
    at = ("--address", place.address)
    run = place.runs / "long"
    code, output = place.run(
        "submit", "tiny.yaml", "name=long", "num_steps=400", "checkpoint.every_steps=400", "--no-wait", *at
    )
    assert code == 0, output
    job = re.search(r"as job (long-\w+)", output)
    assert job, output
    code, output = place.run("submit", "tiny.yaml", "name=long", *at)
    assert code == 2, output
    assert "a run named long is under way" in output
    watching = place.begin("logs", "long", *at)
    assert watching.stdout
    first = next(line for line in watching.stdout if line.startswith("step"))
    assert first.startswith("step   1/400  reward ")
    os.killpg(watching.pid, signal.SIGINT)
    output, _ = watching.communicate(timeout=60)
    assert watching.returncode == 130, output
    assert "long goes on without this window" in output

    told_to_ray(place)

    (driver,) = [p for p in psutil.process_iter(["cmdline"]) if drives(p, place)]
    driver.kill()
    before = num_steps(run)
    wait_for(lambda: num_steps(run) >= before + 3, "the run ended with what drove it")
    wait_for(lambda: "running alone" in place.run("status", *at)[1], "not told")

    attached = place.begin("logs", "long", *at)
    assert attached.stdout
    next(line for line in attached.stdout if "job attach long" in line)
    next(line for line in attached.stdout if line.startswith("step   1/400"))

    code, output = place.run("stop", "long", *at)
    assert code == 0, output
    assert "ends after the step under way" in output
    wait_for(lambda: len(list(run.glob("checkpoints/step-*/manifest.json"))) == 1, "no checkpoint")
    steps = num_steps(run)
    assert steps < 400
    output, _ = attached.communicate(timeout=LIMIT_S)
    assert attached.returncode == 143, output
    assert f"step {steps:>3}/400" in output
    assert (run / f"checkpoints/step-{steps:06d}/manifest.json").is_file()
    wait_for(lambda: place.run("stop", "long", *at)[0] == 2, "its controller stays")

    resumed = place.begin("submit", "--resume", "long", *at)
    wait_for(lambda: num_steps(run) >= steps + 2, "not resumed")
    code, output = place.run("stop", "long", "--now", *at)
    assert code == 0, output
    output, _ = resumed.communicate(timeout=LIMIT_S)
    assert resumed.returncode == 143, output
    assert f"after step {steps}" in output
    numbers = [m["step"] for m in metrics(run)]
    assert numbers == list(range(1, len(numbers) + 1))


def told_to_ray(place: Place) -> None:
    """Names in the dashboard, and figures for Prometheus; both without knowing of grpo-ray."""
    actors = place.ask("actors")
    names = {a["name"] for a in actors if a["state"] == "ALIVE"}
    assert {f"long/{who}" for who in ("controller", "rollout-0", "reward-0", "learner-0")} <= names
    with urllib.request.urlopen(f"http://127.0.0.1:{place.agent}/api/local_raylet_healthz", timeout=60) as answer:
        assert answer.status == 200, "what the image's HEALTHCHECK asks needs no token"

    values: dict[str, float] = {}

    def steps_are_told() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{place.metrics}/metrics", timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        ours = [line for line in lines if line.startswith("ray_grpo_") and 'run="long"' in line]
        values.clear()
        for line in ours:
            (found,) = re.finditer(r"^(\w+)\{(.*)\} (\S+)", line)
            name, labels, value = found.groups()
            values[name + "/" + re.findall(r'\bof="([^"]*)"', labels)[0]] = float(value)
        return values.get("ray_grpo_steps_total/", 0) >= 2

    wait_for(steps_are_told, "no figures for Prometheus")
    assert {name.split("/")[0] for name in values} <= series()
    assert values["ray_grpo_alive/rollout"] == 1
    assert values["ray_grpo_time_step/"] > 0
    assert values["ray_grpo_reward_mean/"] == pytest.approx(values["ray_grpo_reward_mean/my_rewards.share_of_digits"])
    assert values["ray_grpo_step_seconds_count/"] == values["ray_grpo_steps_total/"]
    assert values["ray_grpo_trained_groups_total/"] == 4 * values["ray_grpo_steps_total/"]


def drives(process: psutil.Process, place: Place) -> bool:
    """Is it what Ray's job manager started for a run?"""
    words = " ".join(process.info["cmdline"] or [])
    return "launch job run" in words and "/bin/sh" not in words and str(place.tmp) in process.cwd()
