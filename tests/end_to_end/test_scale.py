"""Runs on a cluster of several nodes, each a raylet on this machine, that change their workers and lose a node.

make test-cluster
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from actors.runtime import log_tail
from grpo_ray.run.run_dir import RunDir
from tests.end_to_end.clusters import Place
from tests.end_to_end.runs import ledger, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT_S = 200
SMOKE_S = 600
COMPARED = 50
"""Steps, of two runs."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("place"))
    try:
        place.make_token()
        place.start_head()
        place.add_node("samplers", 2, engines=1)
        place.add_node("learners", 2)
        wait_for(lambda: sorted(place.nodes().values()) == ["", "learners", "samplers"], "the nodes do not join")
        yield place
    finally:
        place.close()


def wait_for(what: Callable[[], bool], why: str, run: Path | None = None, limit_s: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not what():
        if time.monotonic() > deadline:
            logs = sorted(run.glob("logs/*.log")) if run else []
            pytest.fail("\n".join([why, *(f"{log.name}: {log_tail(log)}" for log in logs)]))
        time.sleep(0.2)


def steps(run: Path) -> list[dict[str, float]]:
    return metrics(run) if (run / "metrics.jsonl").exists() else []


def await_step(run: Path, number: int) -> None:
    wait_for(lambda: len(steps(run)) >= number, f"no step {number}", run)


def await_workers(run: Path, role: str, number: int) -> int:
    """A step later than now that had so many of them."""
    after = len(steps(run))

    def later() -> list[dict[str, float]]:
        return [m for m in steps(run)[after:] if m[f"workers/{role}"] == number]

    wait_for(lambda: bool(later()), f"no step with {role} {number}", run)
    return int(later()[0]["step"])


def is_live(place: Place, name: str) -> bool:
    return any(a["name"] == f"{name}/controller" and a["state"] == "ALIVE" for a in place.ask("actors"))


def check_ledger(run: Path, prompts_per_step: int = 4) -> None:
    """Every prompt once, in order, and nothing under way but what a resume would sample again."""
    rows = ledger(run)
    trained = [row for row in rows if row[2] == "trained"]
    assert len({row[0] for row in rows}) == len(rows)
    assert [row[1] for row in rows] == list(range(len(rows)))
    assert [row[3] for row in trained] == [i // prompts_per_step + 1 for i in range(len(trained))]
    assert len(trained) == prompts_per_step * len(steps(run))
    assert [m["step"] for m in steps(run)] == list(range(1, len(steps(run)) + 1))


def test_workers_of_each_role_come_and_go_in_one_run(place: Place) -> None:
    at = ("--address", place.address)
    options: tuple[str, ...] = (
        "rollout.labels={site: samplers}",
        "learner.labels={site: learners}",
        "reward.num_actors=2",
    )
    options = (*options, "checkpoint.every_steps=1000", "learner.learning_rate=1e-5")
    code, output = place.run("submit", "tiny.yaml", "name=whole", f"num_steps={COMPARED}", *options, *at)
    assert code == 0, output
    code, output = place.run("submit", "tiny.yaml", "name=scaled", "num_steps=4000", *options, "--no-wait", *at)
    assert code == 0, output
    run = place.runs / "scaled"
    await_step(run, 2)
    where = place.where("scaled")
    assert (where["rollout-0"], where["learner-0"]) == ("samplers", "learners")

    code, output = place.run("scale", "scaled", "learner=2", *at)
    assert code == 0, output
    assert "learner 1 -> 2; learners change after the step under way" in output
    two_from = await_workers(run, "learner", 2)
    assert place.where("scaled")["learner-1"] == "learners"

    code, output = place.run("scale", "scaled", "rollout=2", "reward=6", "learner=1", *at)
    assert code == 0, output
    assert "rollout 1 -> 2, reward 2 -> 6, learner 2 -> 1; samplers join with the next weights" in output
    one_from = await_workers(run, "learner", 1)
    await_workers(run, "reward", 6)
    await_workers(run, "rollout", 2)
    where = place.where("scaled")
    assert [where[f"rollout-{i}"] for i in range(2)] == ["samplers", "samplers"]
    wait_for(lambda: steps(run)[-1]["sync/engines"] == 2, "the new sampler gets no weights")
    code, output = place.run("status", "scaled", *at)
    assert code == 0, output
    assert output.splitlines()[1].split()[-4:-1] == ["2", "6", "1"], output

    code, output = place.run("scale", "scaled", "rollout=1", "reward=3", *at)
    assert code == 0, output
    await_workers(run, "rollout", 1)
    await_workers(run, "reward", 3)
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert [kept[role]["num_actors"] for role in ("rollout", "reward", "learner")] == [1, 3, 1]

    assert place.run("stop", "scaled", *at)[0] == 0
    wait_for(lambda: not is_live(place, "scaled"), "it does not end")
    check_ledger(run)
    print(f"{len(steps(run))} steps, two learners from step {two_from} to {one_from}")
    assert two_from < one_from
    assert two_from < COMPARED
    for name in ("reward/mean", "grad_norm"):
        figures = [m[name] for m in steps(run)[:COMPARED]]
        assert figures == pytest.approx([m[name] for m in steps(place.runs / "whole")], rel=1e-3), name


def test_the_smoke_run_reaches_its_accuracy_while_workers_of_each_role_come_and_go(place: Place) -> None:
    at = ("--address", place.address)
    code, output = place.run("sft", "smoke_sft")
    assert code == 0, output
    options = (
        f"model.path={place.folder}/runs/smoke-sft/hf",
        "rollout.labels={site: samplers}",
        "rollout.num_cpus=0.5",
        "reward.num_actors=2",
        "learner.labels={site: learners}",
    )
    code, output = place.run("submit", "smoke", "name=accurate", *options, "--no-wait", *at)
    assert code == 0, output
    run = place.runs / "accurate"
    await_step(run, 2)
    code, output = place.run("scale", "accurate", "rollout=3", "reward=6", "learner=2", *at)
    assert code == 0, output
    await_workers(run, "reward", 6)
    await_workers(run, "learner", 2)
    await_workers(run, "rollout", 3)
    wait_for(lambda: steps(run)[-1]["sync/engines"] == 3, "the new samplers get no weights", run)
    three_from = len(steps(run))
    await_step(run, three_from + 5)
    code, output = place.run("scale", "accurate", "rollout=1", "reward=2", "learner=1", *at)
    assert code == 0, output
    for role, number in (("reward", 2), ("learner", 1), ("rollout", 1)):
        await_workers(run, role, number)
    one_from = len(steps(run))
    wait_for(lambda: not is_live(place, "accurate"), "it does not end", run, SMOKE_S)
    check_ledger(run, prompts_per_step=32)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    accuracy = [line["eval/accuracy"] for line in lines if "eval/accuracy" in line]
    print(f"three samplers from step {three_from}, one from {one_from}; accuracy {accuracy}")
    assert accuracy[0] < 0.6
    assert accuracy[-1] >= 0.9


def test_a_node_that_dies_with_a_sampler_costs_nothing_but_that(place: Place) -> None:
    at = ("--address", place.address)
    place.add_node("spare", 1, engines=1)
    wait_for(lambda: "spare" in place.nodes().values(), "the node does not join")
    options: tuple[str, ...] = (
        "rollout.num_actors=2",
        "rollout.resources={engines: 1}",
        "learner.labels={site: learners}",
    )
    options = (*options, "algorithm.max_staleness=1")
    code, output = place.run("submit", "tiny.yaml", "name=node", "num_steps=4000", *options, "--no-wait", *at)
    assert code == 0, output
    run = place.runs / "node"
    await_step(run, 2)
    lost = next(name for name, site in place.where("node").items() if site == "spare" and "rollout" in name)
    before = len(steps(run))
    place.kill_node("spare")
    began = time.monotonic()
    await_step(run, before + 20)
    print(f"20 steps in {time.monotonic() - began:.1f} s after the node died")
    assert lost not in place.where("node")
    # Until Ray knows it, what needs no resources may be put on the dead node, and is not put elsewhere.
    wait_for(lambda: "spare" not in place.nodes().values(), "Ray does not notice")
    # What is left is enough for one.
    code, output = place.run("scale", "node", "rollout=1", "reward=3", *at)
    assert code == 0, output
    await_workers(run, "reward", 3)
    await_workers(run, "rollout", 1)
    assert place.run("stop", "node", *at)[0] == 0
    wait_for(lambda: not is_live(place, "node"), "it does not end")
    check_ledger(run)
    assert max(m["staleness/max"] for m in steps(run)) <= 1

    done = len(steps(run))
    resumed = place.begin("submit", "--resume", "node", *at)
    await_step(run, done + 2)
    assert (steps(run)[-1]["workers/rollout"], steps(run)[-1]["workers/reward"]) == (1, 3), "what was asked for last"
    assert place.run("stop", "node", "--now", *at)[0] == 0
    output, _ = resumed.communicate(timeout=LIMIT_S)
    assert f"{lost} died and is restarted" not in output


def test_a_node_that_is_taken_away_leads_to_a_checkpoint_before_it_goes(place: Place) -> None:
    at = ("--address", place.address)
    place.add_node("spot", 1)
    wait_for(lambda: "spot" in place.nodes().values(), "the node does not join")
    options: tuple[str, ...] = (
        "rollout.labels={site: samplers}",
        "learner.labels={site: spot}",
        "checkpoint.every_steps=100000",
    )
    code, output = place.run("submit", "tiny.yaml", "name=spot", "num_steps=4000", *options, "--no-wait", *at)
    assert code == 0, output
    run = place.runs / "spot"
    await_step(run, 2)
    place.drain_node("spot", 15)
    wait_for(lambda: bool(RunDir(run).steps()), "no checkpoint")
    saved = RunDir(run).steps()[-1]
    assert place.where("spot")["learner-0"] == "spot", "the checkpoint comes while the node is still there"
    await_step(run, saved + 3)
    place.kill_node("spot")
    wait_for(lambda: "spot" not in place.nodes().values(), "the node does not go")
    place.add_node("spot", 1)
    wait_for(lambda: "spot" in place.nodes().values(), "no node comes in its place")
    await_step(run, len(steps(run)) + 3)
    assert place.run("stop", "spot", *at)[0] == 0
    wait_for(lambda: not is_live(place, "spot"), "it does not end")
    told = place.run("logs", "spot", *at)[1]
    assert re.search(r"node \w+ is taken away in 1\d s: a checkpoint after the step under way", told), told
    assert re.search(rf"learners start again from the checkpoint of step {saved}\b", told), told
    check_ledger(run)
    place.kill_node("spot")


def test_a_run_that_waits_for_its_sampler_gives_itself_another(place: Place) -> None:
    at = ("--address", place.address)
    wait_for(lambda: "spot" not in place.nodes().values(), "a node more than the message below counts with")
    options = (
        "rollout.min_actors=1",
        "rollout.max_actors=2",
        "rollout.max_num_seqs=2",
        "learner.labels={site: learners}",
    )
    code, output = place.run("submit", "tiny.yaml", "name=itself", "num_steps=2000", *options, "--no-wait", *at)
    assert code == 0, output
    run = place.runs / "itself"
    await_step(run, 1)
    assert steps(run)[0]["workers/rollout"] == 1
    await_workers(run, "rollout", 2)
    code, output = place.run("scale", "itself", "learner=50", "reward=2", *at)
    assert code == 1, output
    assert "error: `learner=50 reward=2` can't be used" in output
    assert "learner.num_actors (50) is more than the 16 samples of a step" in output
    code, output = place.run("scale", "itself", "learner=16", *at)
    assert code == 1, output
    assert (
        "error: the cluster is too small: 9 CPUs are asked for (rollout 2 x 0.5 + learner 16 x 0.5), 8 are there"
        in output
    )
    assert place.run("stop", "itself", *at)[0] == 0
    wait_for(lambda: not is_live(place, "itself"), "it does not end")
    told = place.run("logs", "itself", *at)[1]
    assert "the run scaled itself: rollout 1 -> 2 (busy " in told
    check_ledger(run)
