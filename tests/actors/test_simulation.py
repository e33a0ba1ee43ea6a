"""The controller over a simulated cluster, in virtual time: it reaches what the lengths of the samples allow; and however they
overtake each other, it trains every prompt once, in order, and never on weights that are too old."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.reward.pool import WATCH_S, RewardPool
from actors.reward.users_worker import SILENT_S
from actors.rollout.engines import POLL_S, POLLS_PER_S
from actors.rollout.pool import RolloutPool
from actors.weights.protocol import EngineTarget
from actors.weights.sync import RayWeightSync, ask_each
from grpo_ray.data.cursor import Cursor
from grpo_ray.errors import DeadlineError, WorkerError
from grpo_ray.types import SampleInfo, SampleRequest, SamplingParams, ScoreRequest
from tests.bench.simulated import Cluster, Learners, Plan, Result, Rows, Simulation, VirtualLoop, World, oldest_trained

SMALL = Plan(
    samplers=32,
    learners=8,
    scorers=8,
    prompts=16,
    rows=4096,
    max_num_seqs=16,
    max_tokens=16_384,
    learner_tokens_per_s=500,
)
"""256 samples a step, of 3,700 tokens in the mean. The longest takes 165 s alone on its engine, an update about 250 s."""


def simulate(folder: Path, plan: Plan) -> tuple[Result, list[tuple[str, int, str, int]]]:
    simulation = Simulation(plan, folder)
    result = simulation.run(keep_batches=True)
    with sqlite3.connect(simulation.run_dir.ledger) as db:
        rows = db.execute(
            "SELECT prompt_id, dispatch_order, state, step FROM groups ORDER BY dispatch_order"
        ).fetchall()
    assert oldest_trained(simulation.run_dir.ledger) <= plan.staleness
    return result, rows


REQUEST = ScoreRequest(SampleInfo("rows/0/1", 0, 1, 3, 0, "stop", "rollout-0", None, 0), "", None, {})


def on_paper(plan: Plan, work: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    """`work` in the time of the simulated actors."""
    cluster = Cluster()
    with asyncio.Runner(loop_factory=lambda: VirtualLoop(cluster)) as runner:
        runner.run(work(World(plan, cluster)))


def check_every_prompt_once_in_order(result: Result, rows: list[tuple[str, int, str, int]]) -> None:
    plan = result.plan
    assert (result.how, result.troubles) == ("finished", [])
    cursor = Cursor(Rows(plan.rows), seed=plan.config().seed)
    expected = [cursor.next().id for _ in range(plan.steps * plan.prompts)]
    assert [p for batch in result.trained for p in batch] == expected
    assert rows == [(p, i, "trained", i // plan.prompts + 1) for i, p in enumerate(expected)]


@pytest.mark.parametrize(("staleness", "steps", "of_ideal"), [(0, 8, 0.50), (1, 12, 0.97), (4, 20, 0.98)])
def test_learners_wait_for_nothing_but_the_longest_sample(
    tmp_path: Path, staleness: int, steps: int, of_ideal: float
) -> None:
    result, rows = simulate(tmp_path, SMALL.with_(staleness=staleness, steps=steps, overlap=False))
    check_every_prompt_once_in_order(result, rows)
    assert oldest_trained(tmp_path / "ledger.sqlite") == staleness
    assert result.late_s == 0, "an update begins the moment its last score is there and the sync before it is over"
    assert result.of_ideal > of_ideal
    assert result.step_s < 1.05 * result.bound_s
    assert staleness > 1 or result.num_queued == 0, "no engine is full while another has places"


def test_on_policy_the_learners_work_while_the_last_groups_are_sampled(tmp_path: Path) -> None:
    plan = SMALL.with_(staleness=0, steps=8)
    result, rows = simulate(tmp_path / "overlapped", plan)
    after, _ = simulate(tmp_path / "after", plan.with_(overlap=False))
    check_every_prompt_once_in_order(result, rows)
    assert result.trained == after.trained
    assert result.learners_idle < 0.8 * after.learners_idle


def test_batches_that_wait_for_the_learners_leave_the_samplers_at_work(tmp_path: Path) -> None:
    """Every batch is whole when its step begins; what follows it is begun all the same."""
    result, rows = simulate(tmp_path, SMALL.with_(steps=12, max_tokens=4096))
    check_every_prompt_once_in_order(result, rows)
    assert result.learners_idle < 0.01


@pytest.mark.parametrize(("staleness", "steps", "of_ideal"), [(1, 10, 0.90), (4, 18, 0.93)])
def test_samplers_are_kept_busy_when_learners_are_fast(
    tmp_path: Path, staleness: int, steps: int, of_ideal: float
) -> None:
    plan = SMALL.with_(staleness=staleness, steps=steps, learner_tokens_per_s=6000.0, max_num_seqs=2)
    result, rows = simulate(tmp_path, plan)
    check_every_prompt_once_in_order(result, rows)
    assert result.late_s == 0
    assert result.of_ideal > of_ideal


@pytest.mark.parametrize("staleness", [0, 2])
def test_engines_that_die_cost_time_and_nothing_else(tmp_path: Path, staleness: int) -> None:
    plan = SMALL.with_(staleness=staleness, steps=10)
    whole, rows = simulate(tmp_path / "whole", plan)
    deaths = tuple(range(50, 2000, 200))
    result, again = simulate(tmp_path / "again", plan.with_(deaths=deaths))
    assert result.num_deaths == len(result.troubles) == len(deaths)
    assert (again, result.trained) == (rows, whole.trained)
    assert result.of_ideal > 0.75 * whole.of_ideal


GROWS, SHRINKS, FLAPS = (
    ((200.0, 96, 24),),
    ((200.0, 4, 1),),
    tuple((5 + 0.7 * i, 1 + 7 * i % 40, 1 + 5 * i % 9) for i in range(100)),
)


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("scale", [GROWS, SHRINKS, FLAPS], ids=["grows", "shrinks", "flaps"])
def test_workers_that_come_and_go_change_nothing_but_the_time(
    tmp_path: Path, staleness: int, scale: tuple[tuple[float, int, int], ...]
) -> None:
    plan = SMALL.with_(staleness=staleness, steps=10, learner_tokens_per_s=1e5, max_num_seqs=2, max_tokens=2048)
    whole, rows = simulate(tmp_path / "whole", plan)
    result, again = simulate(tmp_path / "again", plan.with_(scale=scale))
    assert (again, result.trained, result.troubles) == (rows, whole.trained, [])
    assert result.alive == scale[-1][1:]
    seconds, before = (r.steady.now_s / r.num_steps for r in (result, whole))
    if scale is not FLAPS:
        assert (seconds < 0.6 * before) if scale is GROWS else (seconds > 2 * before)


@pytest.mark.parametrize("staleness", [0, 2])
def test_engines_that_die_while_others_come_and_go_lose_nothing(tmp_path: Path, staleness: int) -> None:
    plan = SMALL.with_(staleness=staleness, steps=10, max_num_seqs=2)
    whole, rows = simulate(tmp_path / "whole", plan)
    deaths = tuple(range(20, 400, 31))
    result, again = simulate(tmp_path / "again", plan.with_(scale=FLAPS, deaths=deaths))
    assert (again, result.trained) == (rows, whole.trained)
    assert result.num_deaths > 3
    assert result.alive == FLAPS[-1][1:]


@pytest.mark.parametrize("staleness", [0, 2])
def test_prompts_that_end_engines_are_set_aside_and_no_other_is_blamed(tmp_path: Path, staleness: int) -> None:
    plan = SMALL.with_(staleness=staleness, steps=10)
    cursor = Cursor(Rows(plan.rows), seed=plan.config().seed)
    order = [cursor.next().id for _ in range(plan.steps * plan.prompts + 3)]
    poison = {order[5], order[40], order[41]}
    result, rows = simulate(tmp_path, plan.with_(poison=frozenset(poison), deaths=tuple(range(50, 2000, 300))))
    assert result.how == "finished"
    assert [row[:3] for row in rows] == [(p, i, "dropped" if p in poison else "trained") for i, p in enumerate(order)]
    assert [p for batch in result.trained for p in batch] == [p for p in order if p not in poison]


def test_samples_fail_at_once_when_no_learner_is_left_that_could_give_a_restarted_engine_its_weights(
    tmp_path: Path,
) -> None:
    """They would wait for the deadline of a sample; failed, the run sees that its learners are gone."""
    plan, cluster = SMALL.with_(samplers=1), Cluster()

    async def sync() -> None:
        raise WorkerError("learner-0 died during weights_connect")

    async def use() -> float:
        world = World(plan, cluster)
        pool = await RolloutPool.create(plan.config(), "none", str(tmp_path), has_gpus=True, actors=world)
        pool.mark_synced(pool.engines(), 3)
        pool.on_stale = sync
        pool.lost_learner = lambda: "learner-0 died"
        sample = pool.generate(SampleRequest("rows/0/0", 0, [1], 7, SamplingParams(1.0, 1.0, -1, 0.0, 64, ())))
        await asyncio.sleep(0.01)
        world.engines[0].die()
        with pytest.raises(WorkerError, match="learner-0 died"):
            await sample
        seconds = cluster.now
        await pool.close()
        return seconds

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(cluster)) as runner:
        assert runner.run(use()) < 10


def test_a_scorer_that_never_answers_is_ended_and_its_samples_are_scored_by_another(tmp_path: Path) -> None:
    plan = SMALL.with_(steps=3, hangs=3)
    result, rows = simulate(tmp_path, plan)
    check_every_prompt_once_in_order(result, rows)


def test_scorers_that_die_as_long_as_a_run_lasts_are_replaced_every_time(tmp_path: Path) -> None:
    plan = SMALL.with_(steps=6, scorer_deaths=20)
    result, rows = simulate(tmp_path, plan)
    check_every_prompt_once_in_order(result, rows)
    assert result.num_scorer_deaths > 5 * plan.scorers
    assert result.alive == (plan.samplers, plan.scorers)


def test_scorers_that_memory_runs_out_for_are_replaced_like_dead_ones(tmp_path: Path) -> None:
    plan = SMALL.with_(steps=3, scorer_deaths=20, out_of_memory=True)
    result, rows = simulate(tmp_path, plan)
    check_every_prompt_once_in_order(result, rows)
    assert result.num_scorer_deaths > plan.scorers
    assert result.alive == (plan.samplers, plan.scorers)


def test_memory_that_stays_short_is_waited_for_later_and_later_and_ends_the_pool_with_what_took_it(
    tmp_path: Path,
) -> None:
    plan = SMALL.with_(scorers=1, scorer_deaths=1, out_of_memory=True)

    async def work(world: World) -> None:
        pool = await RewardPool.create(plan.config().reward, str(tmp_path), actors=world, max_restarts=4)
        told: list[str] = []
        pool.on_trouble = told.append
        began = world.cluster.now
        with pytest.raises(
            WorkerError, match=r"as 4 before it(.|\n)*learners 14\.05\.\nLower learner\.micro_batch_tokens"
        ):
            await pool.score([REQUEST])
        assert world.num_scorer_deaths == 5
        assert world.cluster.now - began > 2 + 4 + 8 + 16
        assert len(told) == 4
        assert all(
            t.startswith("reward-0 died and is restarted: Ray ended it for lack of memory: 22.59 of") for t in told
        )
        await pool.close()

    on_paper(plan, work)


def test_an_engine_that_hangs_behind_an_actor_that_answers_is_ended_when_a_probe_is_overdue(tmp_path: Path) -> None:
    plan = SMALL.with_(steps=10)
    whole, rows = simulate(tmp_path / "whole", plan)
    result, again = simulate(tmp_path / "again", plan.with_(freezes=(100.0, 900.0)))
    assert (again, result.trained) == (rows, whole.trained)
    assert [line.partition(" died and is restarted: ")[2] for line in result.troubles] == [
        "it hangs: no answer for 60 s (deadlines.sync_s)"
    ] * 2
    found_s = POLL_S + plan.config().deadlines.of_sync(has_gpus=True)
    assert result.steady.now_s < whole.steady.now_s + 2 * (found_s + plan.longest_s)


def test_a_scorer_that_is_silent_altogether_is_ended_within_minutes(tmp_path: Path) -> None:
    plan = SMALL.with_(steps=3, staleness=0, hangs=3, frozen=3)
    whole, _ = simulate(tmp_path / "whole", plan.with_(hangs=0))
    result, rows = simulate(tmp_path / "again", plan)
    check_every_prompt_once_in_order(result, rows)
    assert result.seconds < whole.seconds + 3 * (WATCH_S + SILENT_S)


def test_workers_whose_node_is_gone_for_hours_come_back_with_it(tmp_path: Path) -> None:
    """There is no room for them meanwhile: their start is begun again and again, while the others go on."""
    plan = SMALL.with_(steps=40, deaths=(50.0,), hangs=1, frozen=1, no_room=(40.0, 5000.0))
    result, rows = simulate(tmp_path, plan)
    assert result.seconds > 6000
    assert [row[2] for row in rows] == ["trained"] * (plan.steps * plan.prompts)
    assert result.alive == (plan.samplers, plan.scorers)


def test_what_a_dead_scorer_held_goes_to_an_idle_one_at_once(tmp_path: Path) -> None:
    plan = SMALL.with_(scorers=2, hangs=1)

    async def work(world: World) -> None:
        pool = await RewardPool.create(plan.config().reward, str(tmp_path), actors=world)
        answer = pool.score([REQUEST])
        await asyncio.sleep(1.0)
        died_at = world.cluster.now
        world.kill(pool._workers[0].handle)
        assert [score.value for score in await answer] == [1.0]
        assert world.cluster.now - died_at < 0.1, "another worker takes a second to start"
        await pool.close()

    on_paper(plan, work)


@pytest.mark.parametrize(("num_hanging", "limit_s"), [(1, 36), (3, 246), (99, 660)])
def test_a_scorer_that_hangs_while_it_starts_again_is_begun_anew_as_long_as_a_start_may_take(
    tmp_path: Path, num_hanging: int, limit_s: float
) -> None:
    """The first start took a second: the next may take 35, then 70, 140 and so on."""
    plan = SMALL.with_(scorers=1, hangs=1)

    async def work(world: World) -> None:
        pool = await RewardPool.create(plan.config().reward, str(tmp_path), actors=world)
        answer = pool.score([REQUEST])
        await asyncio.sleep(1.0)
        times = iter([1e9] * num_hanging)
        world.start_s = lambda: next(times, 1.0)
        died_at = world.cluster.now
        world.kill(pool._workers[0].handle)
        if num_hanging < 10:
            assert [score.value for score in await answer] == [1.0]
        else:
            with pytest.raises(DeadlineError, match="start of reward-0 did not finish within 660 s"):
                await answer
        assert limit_s - 1 <= world.cluster.now - died_at <= limit_s + 1
        await pool.close()

    on_paper(plan, work)


def test_a_scorer_whose_node_is_gone_ends_no_pool_in_the_moment_in_which_the_only_other_one_restarts(
    tmp_path: Path,
) -> None:
    """Its sixth try ends after 1,745 s; the other worker dies half a second before."""
    plan = SMALL.with_(scorers=2, hangs=2)

    async def work(world: World) -> None:
        pool = await RewardPool.create(plan.config().reward, str(tmp_path), actors=world)
        pool.on_trouble = lambda text: None
        answer = pool.score([REQUEST])
        await asyncio.sleep(1.0)
        times = iter([1e9] * 6)
        world.start_s = lambda: next(times, 1.0)
        first, second = pool._workers.values()
        world.kill(first.handle)
        await asyncio.sleep(1744.5)
        assert (first.alive, second.alive) == (False, True)
        world.kill(second.handle)
        assert [score.value for score in await answer] == [1.0]
        await asyncio.sleep(5.0)
        assert (first.alive, second.alive) == (True, True)
        await pool.close()

    on_paper(plan, work)


@pytest.mark.parametrize(("num_hanging", "limit_s"), [(1, 38), (3, 250), (99, 600)])
def test_the_only_engine_that_hangs_while_it_starts_again_is_begun_anew_as_long_as_a_start_may_take(
    tmp_path: Path, num_hanging: int, limit_s: float
) -> None:
    """The first start took a second: the next may take 35, then 70, 140 and so on, each a second after the last."""
    plan = SMALL.with_(samplers=1)

    async def work(world: World) -> None:
        pool = await RolloutPool.create(plan.config(), "none", str(tmp_path), has_gpus=True, actors=world)
        pool.on_trouble = lambda text: None
        times = iter([1e9] * num_hanging)
        world.start_s = lambda: next(times, 1.0)
        died_at = world.cluster.now
        sample = pool.generate(SampleRequest("rows/0/0", 0, [1], 7, SamplingParams(1.0, 1.0, -1, 0.0, 64, ())))
        await asyncio.sleep(0.01)
        world.engines[0].die()
        await asyncio.sleep(0.5)
        if num_hanging < 10:
            assert await pool.wait_for_engines()
        else:
            with pytest.raises(
                WorkerError, match=r"rollout-0 does not start again: the start of rollout-0 did not finish"
            ):
                await sample
        assert limit_s - 2 <= world.cluster.now - died_at <= limit_s + 2
        await pool.close()

    on_paper(plan, work)


def test_an_engine_whose_node_is_gone_is_not_given_up_in_the_moment_in_which_the_only_other_one_restarts(
    tmp_path: Path,
) -> None:
    """Its sixth try ends after 1,691 s; the other engine dies half a second before."""
    plan = SMALL.with_(samplers=2)

    async def work(world: World) -> None:
        pool = await RolloutPool.create(plan.config(), "none", str(tmp_path), has_gpus=True, actors=world)
        pool.on_trouble = lambda text: None
        died_at = world.cluster.now
        times = iter([1e9] * 6)
        world.start_s = lambda: next(times, 1.0)
        world.engines[0].die()
        await asyncio.sleep(1690.5)
        assert len(pool.engines()) == 1
        world.engines[1].die()
        await asyncio.sleep(1.0)
        assert (next(times, None), len(pool.engines())) == (None, 0), world.cluster.now - died_at
        await asyncio.sleep(5.0)
        assert len(pool.engines()) == 2
        await pool.close()

    on_paper(plan, work)


def test_an_engine_that_fails_in_a_sync_is_restarted_while_others_are_waited_for(tmp_path: Path) -> None:
    plan = SMALL.with_(samplers=4)
    told: list[tuple[float, str]] = []

    async def work(world: World) -> None:
        pool = await RolloutPool.create(plan.config(), "none", str(tmp_path), has_gpus=True, actors=world)
        pool.on_trouble = lambda text: told.append((world.cluster.now - began, text))
        began = world.cluster.now
        targets = pool.engines()
        world.engines[1].die()
        world.engines[2].probe.remote = lambda: world.answer(None, 1000.0)
        answered, failures = await ask_each(pool, targets, 30.0, "probe")
        assert [(target.name, answer) for target, answer in answered] == [("rollout-0", None), ("rollout-3", None)]
        assert len(failures) == 2
        await pool.close()

    on_paper(plan, work)
    (first, dead), (then, silent) = told
    assert (round(first, 2), round(then, 2)) == (0.0, 30.0)
    assert "rollout-1 died and is restarted" in dead
    assert "probe of rollout-2 for a weight sync did not finish within 30 s" in silent
    assert "deadlines.sync_s" in silent


class FormingLearners(Learners):
    """Learners whose group of a transfer takes as long to form as a transfer, and is complete when every engine has joined."""

    async def connect_weights(self, targets: Sequence[EngineTarget], generation: int) -> None:
        self.targets = targets
        began, plan = self.world.cluster.now, self.world.plan
        assert not any(target.handle.joining for target in targets), "an engine joins while it waits in an older group"
        for target in targets:
            target.handle.joining = True
        while self.world.cluster.now < began + plan.sync_s or any(t.handle.frozen for t in targets):
            await self.world.answer(None, plan.sync_s / 8)
            self._look_after(self.world.cluster.now - began)
        for target in targets:
            target.handle.joining = False


@pytest.mark.parametrize("learners", [Learners, FormingLearners])
@pytest.mark.parametrize("end", ["die", "freeze"])
def test_an_engine_that_is_lost_in_mid_broadcast_costs_that_engine_and_nothing_else_within_a_minute(
    tmp_path: Path, end: str, learners: type[Learners]
) -> None:
    """And so does one that is lost while the group of the transfer is formed."""
    plan = SMALL.with_(samplers=4)

    async def work(world: World) -> None:
        pool = await RolloutPool.create(plan.config(), "none", str(tmp_path), has_gpus=True, actors=world)
        lost: list[tuple[float, str]] = []
        pool.on_trouble = lambda text: lost.append((world.cluster.now - began, text))
        params = SamplingParams(1.0, 1.0, -1, 0.0, 64, ())
        samples = [pool.generate(SampleRequest(f"rows/0/{i}", 0, [1], i, params)) for i in range(32)]
        await asyncio.sleep(0.1)
        lives = {t.name: t.incarnation for t in pool.engines()}
        weights = RayWeightSync(pool, learners(world), plan.config().deadlines.of_sync(has_gpus=True))
        began = world.cluster.now
        world.cluster.at(began + plan.sync_s / 2, getattr(world.engines[1], end))
        report = await weights.sync(1)
        assert report.num_engines == 3
        assert {t.name: t.incarnation for t in pool.engines() if t.name != "rollout-1"} == {
            name: life for name, life in lives.items() if name != "rollout-1"
        }
        (found_s,) = [when for when, text in lost if "rollout-1 died and is restarted" in text]
        assert found_s < (plan.sync_s if end == "die" else 60)
        assert all("rollout-1" in text or "1 more" in text or "2 more" in text for _, text in lost)
        infos = await asyncio.gather(*samples)
        assert {i.prompt_id for i in infos} == {f"rows/0/{i}" for i in range(32)}
        while len(pool.engines()) < 4:
            await asyncio.sleep(1.0)
        await weights.sync(2)
        assert pool.engines(stale_only=True) == []
        await pool.close()

    on_paper(plan, work)


@pytest.mark.parametrize("staleness", [0, 2])
def test_engines_that_die_in_their_syncs_cost_time_and_nothing_else(tmp_path: Path, staleness: int) -> None:
    plan = SMALL.with_(staleness=staleness, steps=10, sync_s=45.0)
    whole, rows = simulate(tmp_path / "whole", plan)
    deaths = tuple(range(50, 4000, 200))
    result, again = simulate(tmp_path / "again", plan.with_(deaths=deaths))
    assert any("more tries" in text for text in result.troubles), "some died in mid-transfer"
    assert (again, result.trained) == (rows, whole.trained)


@pytest.mark.parametrize("samplers", [32, 256])
def test_what_the_controller_does_for_a_group_does_not_grow_with_the_cluster(tmp_path: Path, samplers: int) -> None:
    plan = SMALL.with_(samplers=samplers, prompts=64, max_num_seqs=128, learner_tokens_per_s=2000, steps=8)
    result, _ = simulate(tmp_path, plan)
    steady = result.steady
    # For each engine, whatever it samples: polls that find nothing, probes, two requests, pause and resume.
    by_the_clock = samplers / plan.prompts * (2 * result.step_s / max(POLL_S, samplers / POLLS_PER_S) + 4)
    # For each sample: the answer of its engine, the turn that scorers are called in, and the answer of its scorer.
    assert steady.calls / steady.groups < 2 * plan.group + by_the_clock
    assert steady.turns / steady.groups < 3 * plan.group + by_the_clock


def test_what_the_controller_holds_does_not_grow_with_the_steps(tmp_path: Path) -> None:
    plan = Plan(
        samplers=8,
        learners=2,
        scorers=4,
        prompts=4,
        group=4,
        steps=320,
        rows=500,
        median_tokens=200,
        max_tokens=2048,
        learner_tokens_per_s=100,
    )
    blocks = []

    def look(step: int, world: World) -> None:
        if step in (160, 310):
            gc.collect()
            blocks.append(sys.getallocatedblocks())

    result = Simulation(plan, tmp_path, on_step=look).run()
    before, after = blocks
    assert result.how == "finished"
    assert after - before < 300, "one object for each of 150 x 4 groups would be 600"
