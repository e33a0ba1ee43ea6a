"""What is told of a worker that died, and which deaths are for want of memory."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from actors.deaths import CORE_DIED, KernelKills, fate, is_lost, kind_of, memory_wait_s, users
from actors.learner.group import LearnerGroup
from grpo_ray.config.common import DeadlineConfig
from grpo_ray.errors import NoMemoryError, RewardError, WorkerError
from grpo_ray.rewards.functions.function import RewardFunction, ScoreInputs
from grpo_ray.rewards.functions.scoring import call_reward

RAYS = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: 09ec98) was \
22.59GB used / 23.54GB limit (0.9597)
OOM kill reason: Memory usage 24255689523B exceeded threshold of 24012260556B (95.0% of 25276063744B limit)
Object store memory usage: [- objects spillable: 0
- bytes spillable: 0
(global lru) used: 0%]
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
(Actor(9fd3): job ID=01000000, lease ID=00, task name=run/learner-0:LearnerActor.__init__, required resources={CPU: 1}, pid=31, \
actual memory used=14.05GB, worker ID=c9)
Selected to kill: (Actor(9fd4): job ID=01000000, lease ID=00, task name=run/rewards-0:RewardActor.__init__, required resources={}, \
pid=32, actual memory used=0.06GB, worker ID=c8)
]
Total non-selected idle workers: 1
To see more information about memory usage on this node, use `ray logs raylet.out -ip 10.0.0.7`
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
31\t14.05\tray::LearnerActor
33\t4.50\tVLLM::EngineCore
34\t1.25\tray::RolloutActor.poll
35\t0.47\tpython someone_elses.py --n 10, 000
36\t0.10\tray::DashboardAgent
32\t0.06\tray::RewardActor.score
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/. Consider provisioning more memory. To \
adjust the kill threshold, set the environment variable `RAY_memory_usage_threshold` when starting Ray.
"""


def task_error(cause: Exception) -> RayTaskError:
    return RayTaskError("score", "Traceback ...", cause).as_instanceof_cause()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OutOfMemoryError(RAYS), "out of memory"),
        (ActorDiedError(), "died"),
        (WorkerCrashedError(), "died"),
        (task_error(MemoryError()), "out of memory"),
        (
            task_error(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")),
            "out of memory",
        ),
        (task_error(OSError(12, "Cannot allocate memory")), "out of memory"),
        (task_error(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")), "out of memory"),
        (task_error(ValueError("a text about a MemoryError")), "other"),
        (task_error(RewardError("MemoryError: of the user's")), "other"),
        (WorkerError("x"), "other"),
    ],
)
def test_each_way_of_running_out_of_memory_is_told_from_other_ends(error: Exception, kind: str) -> None:
    assert kind_of(error) == kind
    assert is_lost(error) == (kind != "other")


def test_what_ray_always_says_of_a_death_is_no_sign_of_memory() -> None:
    error = ActorDiedError()
    error.error_msg = (
        "The actor died unexpectedly before finishing this task.\nWorker unexpectedly exits. Some common causes include: (1) the "
        "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called; MemoryError"
    )
    assert kind_of(error) == "died"


def test_it_is_told_who_took_the_memory_and_what_lowers_that_in_two_lines() -> None:
    text = fate(OutOfMemoryError(RAYS), "rewards-0")
    assert len(text.splitlines()) == 2
    assert "22.59 of 23.54 GB of node 10.0.0.7 were in use, 0.06 of them by itself" in text
    assert "the most by learners 14.05, engines 5.75, others 0.47, Ray 0.10" in text
    assert text.index("learner.micro_batch_tokens") < text.index("rollout.kv_cache_gb")
    assert "reward.num_actors" not in text


def test_the_table_may_have_shrunk_to_one_line() -> None:
    flat = RAYS.replace("\n", ", ").replace("\t", "  ")
    assert users(flat)["learners"] == 14.05


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("learner-1", "learner.micro_batch_tokens"),
        ("rollout-0", "rollout.kv_cache_gb"),
        ("rewards-3", "reward.num_actors"),
        ("votes-0", "reward.num_actors"),
        ("reward-judge-0", "reward.num_actors"),
        ("controller", "rollout.kv_cache_gb"),
    ],
)
def test_each_kind_of_worker_has_options(name: str, option: str) -> None:
    text = fate(task_error(MemoryError("no room")), name)
    assert option in text
    assert "Traceback" not in text
    if name != "controller":
        assert text.count("num_actors") == 1


def test_a_full_gpu_is_not_a_full_machine() -> None:
    text = fate(task_error(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")), "learner-0")
    assert "its GPU's memory (CUDA out of memory. Tried to allocate 2.00 GiB.)" in text
    assert "learner.offload_optimizer" in text


def test_a_death_while_the_kernel_ended_something_is_for_memory(tmp_path: Path) -> None:
    counts = tmp_path / "vmstat"
    counts.write_text("pgfault 9\noom_kill 3\n")
    kernel = KernelKills([str(counts), str(tmp_path / "missing")])
    assert "kernel" not in fate(ActorDiedError(), "rewards-0", kernel)
    counts.write_text("pgfault 9\noom_kill 4\n")
    assert "for lack of memory. Lower reward.num_actors" in fate(ActorDiedError(), "rewards-0", kernel)
    assert "kernel" not in fate(ActorDiedError(), "rewards-0", kernel)
    core = task_error(WorkerError(f"rollout-0: {CORE_DIED}; logs/rollout-0.log tells more"))
    assert "kernel" not in fate(core, "rollout-0", kernel)
    counts.write_text("oom_kill 5\n")
    assert "kernel" not in fate(task_error(ValueError("its own")), "rollout-0", kernel)
    assert "Lower rollout.kv_cache_gb" in fate(core, "rollout-0", kernel)


def test_waits_grow_to_a_bound() -> None:
    assert [memory_wait_s(n) for n in (1, 2, 3, 4, 5, 50)] == [2, 4, 8, 16, 30, 30]


def test_learners_that_memory_ran_out_for_are_lost_with_the_reason(tmp_path: Path) -> None:
    spec = SimpleNamespace(run_dir=str(tmp_path))
    for error in (OutOfMemoryError(RAYS), task_error(MemoryError("no room"))):
        group = LearnerGroup([], cast(Any, spec), DeadlineConfig())
        # What the others say of the broken connection comes from them first.
        failure = group._failure("update", {0: task_error(RuntimeError("connection closed")), 1: error}, in_step=True)
        assert isinstance(failure, NoMemoryError)
        assert str(failure).startswith("learner-1 died during update: ")
        assert "learner.micro_batch_tokens" in str(failure)
        assert group.lost is not None


def test_a_reward_that_takes_more_than_it_may_is_told_which_option_that_is() -> None:
    def greedy(**_: object) -> list[float]:
        raise MemoryError

    function = RewardFunction("greedy", greedy)
    inputs = ScoreInputs(["p"], ["c"], [[1]], {})
    (score,) = call_reward(function, inputs)
    assert score.detail.startswith("MemoryError")
    assert "reward.memory_gb" in score.detail
