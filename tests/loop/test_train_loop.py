"""The loop over plain objects: what it guarantees whatever the machinery's timing and failures."""

from __future__ import annotations

import asyncio
import json
import math
import random
import sqlite3
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from grpo_ray.config.loading import build, deep_merge, parse_overrides
from grpo_ray.config.schema import RunConfig
from grpo_ray.data.cursor import Cursor
from grpo_ray.errors import NonFiniteError, PoisonedError, RewardError, WorkerError
from grpo_ray.loop.roles import Roles
from grpo_ray.loop.train_loop import TrainLoop
from grpo_ray.run.checkpoint_store import CheckpointLocation
from grpo_ray.run.ledger import Ledger
from grpo_ray.run.manifest import FileSum
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import EvalEvent, MessageEvent, StepEvent
from grpo_ray.types import (
    Group,
    Prompt,
    RewardScore,
    Sample,
    SampleInfo,
    SampleRequest,
    Score,
    ScoreRequest,
    ScoreStatus,
    Step,
    SyncReport,
    Track,
    TrainBatch,
    TrainSample,
    UpdateReport,
    VersionSpan,
)

ROWS = 10


class Rows:
    """A data set of ten prompts, or of as many as are asked for."""

    fingerprint = "ten rows"

    def __init__(self, size: int = ROWS) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def item(self, row: int, epoch: int) -> Prompt:
        return Prompt(f"ten/{epoch}/{row}", [1, 2, 3], f"prompt {row}", None, {"answer": row})


class World:
    """Sampler, scorer, learner, weights and log in one, with random delays and a record of everything."""

    def __init__(self, jitter: int) -> None:
        self.rng = random.Random(jitter)
        self.version = 0
        self.version_of: dict[str, int] = {}
        self.num_drawn = 0
        """Samples."""
        self.under_way: set[str] = set()
        self.begun: list[str] = []
        """Prompts, in the order in which their first samples were asked for."""
        self.most_under_way = 0
        self.batches: list[TrainBatch] = []
        self.parts: list[TrainBatch] = []
        """What came before the batch under way was whole."""
        self.num_parts = 0
        self.written: list[tuple[int, list[str]]] = []
        self.broken: dict[str, ScoreStatus] = {}
        """Prompt, with or without `#index` -> how its score fails."""
        self.same: set[str] = set()
        """Prompts whose samples all score the same."""
        self.distinct = False
        """The samples of all others score differently."""
        self.steps: dict[str, tuple[Step, ...]] = {}
        """Prompt, with or without `#index` -> rewards of steps."""
        self.truncate_above = 100
        """Tokens."""
        self.on_update: Any = None
        self.mismatch: Mapping[int, float | None] | Sequence[float | None] = defaultdict(float)
        """Of each step, as the learner reports it; None: it says nothing."""
        self.closed = False
        self.held = -1
        self.write_s = 0.0
        """How long a checkpoint takes."""
        self.disk_is_full = False

    async def generate(self, request: SampleRequest) -> SampleInfo:
        self.under_way.add(request.prompt_id)
        if request.index == 0:
            self.begun.append(request.prompt_id)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        version = self.version_of[request.prompt_id] = self.version
        await asyncio.sleep(self.rng.random() * 0.002)
        length = request.seed % 7 + 1
        reason = "length" if length > self.truncate_above else "stop"
        tokens = np.arange(length, dtype=np.int32)
        logprobs = np.full(length, -0.1, dtype=np.float32)
        prompt = np.asarray(request.prompt_token_ids, dtype=np.int32)
        # The text says by which seed it was drawn.
        self.num_drawn += 1
        sample = Sample(
            request.prompt_id,
            request.index,
            prompt,
            tokens,
            logprobs,
            (VersionSpan(version, 0, length),),
            reason,
            str(request.seed),
        )
        return SampleInfo(request.prompt_id, request.index, 3, length, version, reason, "w-0", ref=[sample], row=0)

    def take_stats(self) -> dict[str, float]:
        return {}

    def take_tracks(self) -> list[Track]:
        return []

    async def score(self, requests: Sequence[ScoreRequest]) -> list[Score]:
        await asyncio.sleep(self.rng.random() * 0.002)
        return [self._score(r) for r in requests]

    def _score(self, request: ScoreRequest) -> Score:
        name = request.sample.prompt_id
        status = self.broken.get(f"{name}#{request.sample.index}", self.broken.get(name, ScoreStatus.OK))
        if status is not ScoreStatus.OK:
            part = RewardScore("r", status, float("nan"), "broken on purpose")
            return Score(status, float("nan"), (part,), part.detail)
        value = float(request.sample.index if self.distinct else int(request.sample.ref[request.sample.row].text) % 3)
        value = 1.0 if name in self.same else value
        steps = self.steps.get(f"{name}#{request.sample.index}", self.steps.get(name, ()))
        if steps:
            value = sum(s.value for s in steps)
            return Score(status, value, (RewardScore("r", status, value, steps=steps),), steps=steps)
        return Score(status, value, (RewardScore("r", status, value),))

    async def accumulate(self, part: TrainBatch) -> None:
        self.parts.append(part)
        await asyncio.sleep(self.rng.random() * 0.002)

    async def update(self, batch: TrainBatch) -> UpdateReport:
        early = [essence_of(s) for part in self.parts for s in part.samples]
        assert len(set(early)) == len(early), "no sample goes through the learner twice"
        assert set(early) == {essence_of(s) for s in batch.samples if s.part is not None}
        assert all(part.step == batch.step for part in self.parts)
        self.num_parts += len(self.parts)
        self.parts = []
        self.under_way.clear()
        self.batches.append(batch)
        if self.on_update is not None:
            self.on_update(batch.version)
        mismatch = self.mismatch[batch.version]
        metrics = {"loss/policy": 0.0, "grad_norm": 1.0}
        metrics |= {} if mismatch is None else {"mismatch/mean_abs": mismatch}
        return UpdateReport(batch.step, metrics, 0.0)

    async def sync(self, version: int) -> SyncReport:
        self.version = version
        return SyncReport(version, 0.01, 0.005, 10, "0", 1)

    async def write(self, step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        assert [s.prompt_id for s in batch.samples] == [s.prompt_id for g in groups for s in g.samples]
        self.written.append((step, [g.prompt.id for g in groups]))

    async def close(self) -> None:
        self.closed = True


def config(*overrides: str) -> RunConfig:
    base = {
        "model": {"tiny": {}, "dtype": "float32"},
        "data": {"train": {"path": "x"}},
        "rollout": {"num_generations": 4, "max_completion_length": 8},
        "reward": {"functions": [{"name": "r"}]},
        "prompts_per_step": 3,
        "num_steps": 7,
        "checkpoint": {"every_steps": 100},
    }
    return build(RunConfig, deep_merge(base, parse_overrides(list(overrides))), "test")


class Keeper:
    """The world as a learner: what it holds is the version."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def accumulate(self, part: TrainBatch) -> None:
        await self.world.accumulate(part)

    async def update(self, batch: TrainBatch) -> UpdateReport:
        return await self.world.update(batch)

    async def hold(self, place: CheckpointLocation, *, export: bool) -> None:
        self.world.held = self.world.version

    async def write(self, place: CheckpointLocation) -> dict[str, FileSum]:
        held = self.world.held
        await asyncio.sleep(self.world.write_s)
        if self.world.disk_is_full:
            raise OSError("No space left on device")
        with place.filling("learner") as (folder, sums):
            (folder / "state.json").write_text(json.dumps(held))
        return sums

    async def load(self, place: CheckpointLocation) -> None:
        self.world.version = json.loads(place.read("learner/state.json"))


class Session:
    """One process's worth of a run."""

    def __init__(
        self, folder: Path, cfg: RunConfig, jitter: int = 0, eval_prompts: Sequence[Prompt] = (), rows: int = ROWS
    ) -> None:
        self.world = World(jitter)
        self.events: list[Any] = []
        self.run_dir = RunDir(folder).with_checkpoints(cfg.checkpoint.path, cfg.deadlines.store_s)
        self.ledger = Ledger(self.run_dir.ledger)
        world = self.world
        self.loop = TrainLoop(
            cfg,
            Roles(world, world, Keeper(world), world, world),
            Cursor(Rows(rows), seed=cfg.seed, shuffle=True),
            {"": eval_prompts} if eval_prompts else {},
            self.ledger,
            self.run_dir,
            [],
            self.events.append,
        )

    def go(self) -> str:
        async def work() -> str:
            steps = self.run_dir.steps()
            if steps:
                await self.loop.restore(steps[-1])
            return await asyncio.wait_for(self.loop.run(), 20)

        try:
            return asyncio.run(work())
        finally:
            self.ledger_rows = self.ledger.rows()
            self.ledger.close()


def essence_of(s: TrainSample) -> tuple[str, int, int, float | None]:
    return s.prompt_id, s.index, s.num_tokens, s.advantage


def essence(batch: TrainBatch) -> list[tuple[str, int, int, float | None]]:
    return [essence_of(s) for s in batch.samples]


def test_every_prompt_is_trained_exactly_once_in_each_epoch(tmp_path: Path) -> None:
    session = Session(tmp_path, config("num_steps=10"))
    assert session.go() == "finished"
    trained = [row[0] for row in session.ledger_rows if row[2] == "trained"]
    assert len(trained) == 30
    for epoch in range(3):
        assert sorted(p for p in trained if p.startswith(f"ten/{epoch}/")) == sorted(
            f"ten/{epoch}/{r}" for r in range(ROWS)
        )


@pytest.mark.parametrize("staleness", [1, 3])
def test_sampling_ahead_keeps_its_bound_and_trains_the_same_prompts_in_the_same_order(
    tmp_path: Path, staleness: int
) -> None:
    on_policy = Session(tmp_path / "on", config("num_steps=10"))
    on_policy.go()
    for jitter in range(3):
        session = Session(
            tmp_path / str(jitter), config("num_steps=10", f"algorithm.max_staleness={staleness}"), jitter
        )
        assert session.go() == "finished"
        ages = [
            batch.version - session.world.version_of[s.prompt_id]
            for batch in session.world.batches
            for s in batch.samples
        ]
        assert max(ages) == staleness
        assert session.world.most_under_way <= 3 * (staleness + 1)
        assert [[s.prompt_id for s in b.samples] for b in session.world.batches] == [
            [s.prompt_id for s in b.samples] for b in on_policy.world.batches
        ]
        assert {row[2] for row in session.ledger_rows} == {"trained"}, "nothing is sampled that no step trains"


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_run_that_samples_ahead_resumes_without_skipping_or_repeating_a_prompt(tmp_path: Path, stop_at: int) -> None:
    settings = (
        "num_steps=10",
        "algorithm.max_staleness=2",
        "algorithm.dynamic_sampling=true",
        "reward.on_failure.abort_above=1",
    )
    trouble = {"ten/0/2": ScoreStatus.CRASHED, "ten/1/5": ScoreStatus.TIMEOUT}
    whole = Session(tmp_path / "whole", config(*settings), 1)
    whole.world.broken, whole.world.same = trouble, {"ten/0/7"}
    whole.go()
    for jitter in (2, 3):
        cut = Session(tmp_path / str(jitter), config(*settings), jitter)
        cut.world.broken, cut.world.same = trouble, {"ten/0/7"}
        cut.world.on_update = lambda step, loop=cut.loop: loop.stop("SIGTERM") if step == stop_at else None
        assert cut.go() == "SIGTERM"
        again = Session(tmp_path / str(jitter), config(*settings), jitter + 10)
        again.world.broken, again.world.same = trouble, {"ten/0/7"}
        assert again.go() == "finished"
        trained = [(row[0], row[3]) for row in again.ledger_rows if row[2] == "trained"]
        assert trained == [(row[0], row[3]) for row in whole.ledger_rows if row[2] == "trained"]
        assert len({prompt for prompt, _ in trained}) == 30


def test_a_spent_budget_of_dynamic_sampling_never_makes_an_empty_batch_while_sampling_ahead(tmp_path: Path) -> None:
    settings = ("algorithm.max_staleness=3", "algorithm.dynamic_sampling=true", "algorithm.max_sampling_rounds=1")
    for jitter in range(5):
        session = Session(tmp_path / str(jitter), config("num_steps=10", *settings), jitter)
        session.world.same = {f"ten/{epoch}/{row}" for epoch in range(9) for row in range(ROWS)} - {"ten/0/3"}
        with pytest.raises(RewardError, match="two different rewards"):
            session.go()
        trained = [row[0] for row in session.ledger_rows if row[2] == "trained"]
        assert trained == ["ten/0/3"] * len(session.world.batches)
        assert len(trained) <= 1


@pytest.mark.parametrize("staleness", [1, 2, 3])
def test_a_budget_spent_on_groups_for_later_steps_leaves_no_group_behind_its_staleness_bound(
    tmp_path: Path, staleness: int
) -> None:
    settings = (
        "algorithm.dynamic_sampling=true",
        "algorithm.max_sampling_rounds=1",
        "prompts_per_step=4",
        "num_steps=12",
    )
    ages = []
    for jitter in range(12):
        session = Session(tmp_path / str(jitter), config(f"algorithm.max_staleness={staleness}", *settings), jitter)
        world = session.world
        world.distinct = True
        world.same = {f"ten/{e}/{r}" for e in range(40) for r in range(ROWS) if world.rng.random() < 0.3}
        draw = world.generate

        async def slow_where_there_is_signal(
            request: SampleRequest, world: World = world, draw: Callable[[SampleRequest], Awaitable[SampleInfo]] = draw
        ) -> SampleInfo:
            info = await draw(request)
            if request.prompt_id not in world.same:
                await asyncio.sleep(world.rng.choice([0.002, 0.006]))
            return info

        world.generate = slow_where_there_is_signal
        # Of a step none of whose groups has a signal the run ends.
        with suppress(RewardError):
            session.go()
        ages += [batch.version - world.version_of[s.prompt_id] for batch in world.batches for s in batch.samples]
    assert len(ages) > 50
    assert max(ages) == staleness


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.1)])
def test_a_mismatch_that_rounding_does_not_explain_is_told_each_time_it_comes_up(
    tmp_path: Path, dtype: str, bound: float
) -> None:
    session = Session(tmp_path, config(f"model.dtype={dtype}"))
    # None: all tokens of the step are of older weights, which says nothing.
    times = [0.43, 2.0, None, 3.0, 0.9, 1.5, 1.0, 0.0]
    session.world.mismatch = [None if t is None else t * bound for t in times] + [0.0] * 10
    session.go()
    told = [e.text for e in session.events if isinstance(e, MessageEvent)]
    assert [t.split("difference| ")[1].split(",")[0] for t in told] == [f"{2 * bound:.4f}", f"{1.5 * bound:.4f}"]


def test_a_batch_does_not_depend_on_timing(tmp_path: Path) -> None:
    runs = []
    for jitter in range(3):
        session = Session(tmp_path / str(jitter), config(), jitter)
        session.go()
        runs.append([essence(b) for b in session.world.batches])
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize("dynamic", ["true", "false"])
def test_finished_groups_reach_the_learner_before_the_batch_is_whole_and_all_of_them_are_in_it(
    tmp_path: Path, staleness: int, dynamic: str
) -> None:
    small = ("data.max_prompt_length=8", "learner.micro_batch_tokens=16", "prompts_per_step=6", "num_steps=10")
    sampling = (f"algorithm.max_staleness={staleness}", f"algorithm.dynamic_sampling={dynamic}")
    plain = Session(tmp_path / "plain", config(*small, *sampling, "learner.overlap=false"))
    plain.world.same = {"ten/0/7"}
    plain.go()
    assert plain.world.num_parts == 0
    parts = 0
    for jitter in range(5):
        session = Session(tmp_path / str(jitter), config(*small, *sampling), jitter)
        session.world.same = {"ten/0/7"}
        assert session.go() == "finished"
        parts += session.world.num_parts
        assert [essence(b) for b in session.world.batches] == [essence(b) for b in plain.world.batches]
    if staleness == 0:
        assert parts > 0
    elif dynamic == "true":
        assert parts == 0, "a group of a later step that drops out would change what is certain"


@pytest.mark.parametrize(("tokens", "begins"), [(100, True), (800, False)])
def test_the_learner_begins_with_a_quarter_of_a_micro_batch_and_not_with_less(
    tmp_path: Path, tokens: int, begins: bool
) -> None:
    """A step has 48 to 132 tokens here, a group 16 to 44."""
    parts = 0
    for jitter in range(5):
        session = Session(
            tmp_path / str(jitter), config("data.max_prompt_length=8", f"learner.micro_batch_tokens={tokens}"), jitter
        )
        session.go()
        parts += session.world.num_parts
    assert (parts > 0) == begins


@pytest.mark.parametrize(
    "needs_all",
    ["algorithm.num_mini_batches=2", "algorithm.num_iterations=2", "algorithm=reinforce_pp", "algorithm=ppo"],
)
def test_a_step_that_needs_its_whole_batch_gets_no_parts(tmp_path: Path, needs_all: str) -> None:
    small = ("data.max_prompt_length=8", "learner.micro_batch_tokens=16", "prompts_per_step=6")
    session = Session(tmp_path, config(*small, needs_all))
    session.go()
    assert session.world.num_parts == 0


def test_a_part_that_fails_ends_the_run_with_its_error(tmp_path: Path) -> None:
    async def fail(part: TrainBatch) -> None:
        raise RuntimeError("learner-1 died during accumulate")

    session = Session(tmp_path, config("data.max_prompt_length=8", "learner.micro_batch_tokens=16"))
    session.world.accumulate = fail
    with pytest.raises(RuntimeError, match="died during accumulate"):
        session.go()


def test_prompts_that_were_long_the_epoch_before_are_begun_first(tmp_path: Path) -> None:
    session = Session(tmp_path, config("prompts_per_step=5", "num_steps=6"))
    session.go()
    length = {(s.prompt_id, s.index): s.num_tokens for batch in session.world.batches for s in batch.samples}
    mean = {p: sum(n for (name, _), n in length.items() if name == p) for p in session.world.begun}
    before = {p: mean.get(f"ten/{int(p.split('/')[1]) - 1}/{p.split('/')[2]}", 0) for p in session.world.begun}
    in_order = [p for batch in session.world.batches for p in dict.fromkeys(s.prompt_id for s in batch.samples)]
    steps = [session.world.begun[a : a + 5] for a in range(0, 30, 5)]
    assert steps[:2] == [in_order[:5], in_order[5:10]]
    for step in steps[2:]:
        assert [before[p] for p in step] == sorted((before[p] for p in step), reverse=True)
    assert steps[2:] != [in_order[a : a + 5] for a in range(10, 30, 5)]


def test_no_more_groups_are_begun_than_one_version_trains(tmp_path: Path) -> None:
    session = Session(tmp_path, config())
    session.go()
    assert session.world.most_under_way == 3


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_stopped_and_resumed_run_equals_one_never_stopped(tmp_path: Path, stop_at: int) -> None:
    whole = Session(tmp_path / "whole", config())
    whole.go()
    first = Session(tmp_path / "cut", config(), jitter=1)
    first.world.on_update = lambda step: first.loop.stop("SIGTERM") if step == stop_at - 1 else None
    assert first.go() == "SIGTERM"
    second = Session(tmp_path / "cut", config(), jitter=2)
    assert second.go() == "finished"
    assert second.ledger_rows == whole.ledger_rows
    halves = first.world.batches + second.world.batches
    assert [essence(b) for b in halves] == [essence(b) for b in whole.world.batches]
    assert [b.step for b in halves] == list(range(1, 8))


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_resumed_run_gives_the_samplers_its_weights_before_they_sample(tmp_path: Path, staleness: int) -> None:
    cfg = config(f"algorithm.max_staleness={staleness}")
    first = Session(tmp_path, cfg)
    first.world.on_update = lambda step: first.loop.stop("SIGTERM") if step == 3 else None
    assert first.go() == "SIGTERM"
    second = Session(tmp_path, cfg, jitter=2)
    done: list[tuple[str, int]] = []
    generate, sync = second.world.generate, second.world.sync

    async def noted_generate(request: SampleRequest) -> SampleInfo:
        done.append(("sample", -1))
        return await generate(request)

    async def noted_sync(version: int) -> SyncReport:
        done.append(("sync", version))
        return await sync(version)

    second.world.generate, second.world.sync = noted_generate, noted_sync
    assert second.go() == "finished"
    assert [version for what, version in done if what == "sync"] == [4, 5, 6, 7]
    assert done[:2] == [("sync", 4), ("sample", -1)]


def test_a_checkpoint_that_is_asked_for_comes_after_the_step_under_way_and_the_run_goes_on(tmp_path: Path) -> None:
    session = Session(tmp_path, config("checkpoint.every_steps=100", "checkpoint.keep=10"))
    session.world.on_update = lambda step: session.loop.checkpoint_soon() if step == 2 else None
    assert session.go() == "finished"
    assert session.loop.run_dir.steps() == [0, 3, 7]


@pytest.mark.parametrize(("minutes", "steps"), [("1e-9", list(range(8))), ("0", [0, 7]), ("60", [0, 7])])
def test_a_checkpoint_comes_after_so_many_minutes_too(tmp_path: Path, minutes: str, steps: list[int]) -> None:
    session = Session(tmp_path, config(f"checkpoint.every_minutes={minutes}", "checkpoint.keep=10"))
    assert session.go() == "finished"
    assert session.loop.run_dir.steps() == steps


@pytest.mark.parametrize("die_at", [0, 1, 3])
def test_a_run_that_dies_before_its_first_checkpoint_goes_on_from_the_one_at_its_beginning(
    tmp_path: Path, die_at: int
) -> None:
    prompts = [Rows().item(r, 0) for r in range(2)]
    whole = Session(tmp_path / "whole", config(), eval_prompts=prompts)
    whole.go()

    def die(step: int) -> None:
        if step == die_at:
            raise RuntimeError("killed")

    first = Session(tmp_path / "cut", config(), eval_prompts=prompts)
    first.world.on_update = die
    with pytest.raises(RuntimeError, match="killed"):
        first.go()
    assert first.run_dir.steps() == [0]
    second = Session(tmp_path / "cut", config(), eval_prompts=prompts)
    assert second.go() == "finished"
    assert second.ledger_rows == whole.ledger_rows
    assert [e.step for e in second.events if isinstance(e, EvalEvent)] == [7], "the first figures are there already"


def test_no_step_is_recorded_before_there_is_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    session = Session(tmp_path, config("num_steps=2"))
    session.world.write_s = 0.3
    seen: list[list[int]] = []
    session.loop.trackers = [
        SimpleNamespace(log=lambda step, metrics: seen.append(session.run_dir.steps()), close=lambda: None)
    ]
    assert session.go() == "finished"
    assert all(steps[:1] == [0] for steps in seen)
    assert len(seen) >= 2


def test_the_trace_of_a_resumed_run_holds_every_step_once(tmp_path: Path) -> None:
    def die(step: int) -> None:
        if step == 5:
            raise RuntimeError("killed")

    first = Session(tmp_path, config("checkpoint.every_steps=2"))
    first.world.on_update = die
    with pytest.raises(RuntimeError, match="killed"):
        first.go()
    assert steps_in_trace(tmp_path) == [f"step {s}" for s in range(1, 6)]
    assert Session(tmp_path, config("checkpoint.every_steps=2")).go() == "finished"
    assert steps_in_trace(tmp_path) == [f"step {s}" for s in range(1, 8)]
    named = [e["args"]["name"] for e in json.loads((tmp_path / "trace.json").read_text()) if e["name"] == "thread_name"]
    assert sorted(named) == ["controller", "steps"]


def steps_in_trace(folder: Path) -> list[str]:
    return [e["name"] for e in json.loads((folder / "trace.json").read_text()) if e["name"].startswith("step ")]


def test_without_tracking_trace_there_is_no_file(tmp_path: Path) -> None:
    assert Session(tmp_path, config("tracking.trace=false")).go() == "finished"
    assert not (tmp_path / "trace.json").exists()


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_run_that_ends_for_want_of_scorers_keeps_the_steps_that_are_done(tmp_path: Path, staleness: int) -> None:
    def prompts_of(session: Session) -> list[set[str]]:
        return [{s.prompt_id for s in batch.samples} for batch in session.world.batches]

    options = config(f"algorithm.max_staleness={staleness}")
    whole = Session(tmp_path / "whole", options)
    whole.go()
    first = Session(tmp_path / "cut", options)
    score = first.world.score

    async def die(requests: Sequence[ScoreRequest]) -> list[Score]:
        if requests[0].sample.prompt_id in prompts_of(whole)[4]:
            raise WorkerError("no reward worker is left")
        return await score(requests)

    first.world.score = die
    with pytest.raises(WorkerError, match="no reward worker is left"):
        first.go()
    done = len(first.world.batches)
    assert first.run_dir.steps() == [0, done]
    assert 4 - staleness <= done <= 4
    second = Session(tmp_path / "cut", options)
    assert second.go() == "finished"
    assert [b.step for b in second.world.batches] == list(range(done + 1, 8))
    assert prompts_of(first) + prompts_of(second) == prompts_of(whole)


def test_a_run_that_died_after_its_checkpoint_trains_the_lost_steps_again(tmp_path: Path) -> None:
    whole = Session(tmp_path / "whole", config())
    whole.go()

    def die(step: int) -> None:
        if step == 5:
            raise RuntimeError("killed")

    first = Session(tmp_path / "cut", config("checkpoint.every_steps=2"))
    first.world.on_update = die
    with pytest.raises(RuntimeError, match="killed"):
        first.go()
    second = Session(tmp_path / "cut", config("checkpoint.every_steps=2"))
    assert second.go() == "finished"
    assert second.world.batches[0].version == 4
    assert second.ledger_rows == whole.ledger_rows


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["checkpoint.every_steps=1"], "step-000003.parquet; `grpo-ray replay {run} --step 3` repeats the step"),
        (["checkpoint.every_steps=5"], "with a checkpoint of step 2 (checkpoint.every_steps=1) `grpo-ray replay"),
        (["tracking.rollouts=false"], "not kept, since tracking.rollouts is false"),
    ],
)
def test_the_batch_of_a_step_that_is_no_number_is_on_disk_before_the_run_ends(
    tmp_path: Path, overrides: list[str], expected: str
) -> None:
    session = Session(tmp_path, config(*overrides))

    def explode(step: int) -> None:
        if step == 2:
            (tmp_path / "rollouts").mkdir()
            (tmp_path / "rollouts" / "step-000003.parquet").touch()
            raise NonFiniteError("step 3: the loss is not a finite number")

    session.world.on_update = explode
    with pytest.raises(NonFiniteError) as e:
        session.go()
    assert str(e.value).startswith("step 3: the loss is not a finite number. Its batch ")
    assert expected.format(run=tmp_path) in str(e.value)
    assert session.world.closed
    step, prompts = session.world.written[-1]
    assert (step, len(prompts)) == (3, 3)
    assert [row[2] for row in session.ledger_rows[6:]] == ["sampled"] * 3


def test_a_failed_score_drops_its_group_and_the_next_prompt_takes_its_place(tmp_path: Path) -> None:
    whole = Session(tmp_path / "whole", config("num_steps=1"))
    whole.go()
    victim = whole.world.batches[0].samples[0].prompt_id
    session = Session(tmp_path / "cut", config("num_steps=1"))
    session.world.broken[victim] = ScoreStatus.TIMEOUT
    session.go()
    (batch,) = session.world.batches
    assert len(batch.samples) == 12
    assert victim not in {s.prompt_id for s in batch.samples}
    assert (victim, "dropped", "reward_timeout") in [(r[0], r[2], r[4]) for r in session.ledger_rows]


def test_under_drop_sample_a_failed_score_leaves_its_sample_out_and_the_others_are_trained(tmp_path: Path) -> None:
    settings = ("num_steps=1", "reward.on_failure={action: drop_sample, abort_above: 1}", "algorithm.advantage=dr_grpo")
    session = Session(tmp_path, config(*settings))
    session.world.distinct = True
    session.world.broken = {f"ten/0/{r}#2": ScoreStatus.CRASHED for r in range(ROWS)}
    tracked: dict[str, float] = {}
    session.loop.trackers = [SimpleNamespace(log=lambda step, metrics: tracked.update(metrics), close=lambda: None)]
    assert session.go() == "finished"
    (batch,) = session.world.batches
    assert len(batch.samples) == 12
    # The samples' rewards are their indices, and index 2 is missing: the mean is 4 / 3.
    for sample in batch.samples:
        lost = sample.index == 2
        assert sample.advantage == pytest.approx(0.0 if lost else sample.index - 4 / 3)
        assert sample.loss_mask is not lost
        assert math.isnan(sample.reward) is lost
    assert [row[2:] for row in session.ledger_rows] == [("trained", 1, None)] * 3
    assert (tracked["reward/dropped_samples"], tracked["reward/failed"], tracked["groups/dropped"]) == (3, 3, 0)
    assert tracked["reward/mean"] == pytest.approx(4 / 3)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as ledger:
        rows = list(ledger.execute("SELECT num_failed_scores, mean_reward FROM groups"))
    assert rows == [(1, pytest.approx(4 / 3))] * 3


def test_under_drop_sample_a_group_without_any_score_is_dropped(tmp_path: Path) -> None:
    whole = Session(tmp_path / "whole", config("num_steps=1"))
    whole.go()
    victim = whole.world.batches[0].samples[0].prompt_id
    settings = ("num_steps=1", "reward.on_failure={action: drop_sample, abort_above: 1}")
    session = Session(tmp_path / "cut", config(*settings))
    session.world.broken[victim] = ScoreStatus.TIMEOUT
    session.go()
    assert victim not in {s.prompt_id for s in session.world.batches[0].samples}
    assert (victim, "dropped", "reward_timeout") in [(r[0], r[2], r[4]) for r in session.ledger_rows]


@pytest.mark.parametrize("value", [-5, 0, 3])
def test_under_the_value_policy_a_failed_score_gets_the_value_and_keeps_its_status(
    tmp_path: Path, value: float
) -> None:
    cfg = config(
        "num_steps=1",
        f"reward.on_failure={{action: value, value: {value}, abort_above: 1}}",
        "algorithm.advantage=dr_grpo",
    )
    session = Session(tmp_path, cfg)
    session.world.same = {f"ten/0/{r}" for r in range(ROWS)}
    session.world.broken = {f"ten/0/{r}#2": ScoreStatus.CRASHED for r in range(ROWS)}
    statuses: list[ScoreStatus] = []
    write = session.world.write

    async def note(step: int, groups: Sequence[Group], batch: TrainBatch) -> None:
        statuses.extend(group.scores[2].status for group in groups)
        await write(step, groups, batch)

    session.world.write = note
    assert session.go() == "finished"
    assert statuses == [ScoreStatus.CRASHED] * 3
    # Three of a group have the reward 1, the failed one the value.
    mean = (3 + value) / 4
    for sample in session.world.batches[0].samples:
        assert sample.advantage == pytest.approx((value if sample.index == 2 else 1) - mean)
        assert sample.loss_mask


def test_too_many_failures_end_the_run_and_name_the_function(tmp_path: Path) -> None:
    session = Session(tmp_path, config())
    session.world.broken = {f"ten/{e}/{r}": ScoreStatus.ERROR for e in range(9) for r in range(ROWS)}
    with pytest.raises(RewardError, match=r"abort_above.*r: error: broken on purpose"):
        session.go()


def test_dynamic_sampling_replaces_groups_without_signal_by_the_next_prompts(tmp_path: Path) -> None:
    runs = []
    for jitter in range(3):
        session = Session(tmp_path / str(jitter), config("algorithm.dynamic_sampling=true"), jitter)
        session.world.same = {f"ten/{e}/{r}" for e in range(9) for r in (1, 4, 7)}
        assert session.go() == "finished"
        runs.append((session.ledger_rows, [essence(b) for b in session.world.batches]))
    assert runs[0] == runs[1] == runs[2]
    rows, batches = runs[0]
    assert all(len(batch) == 12 for batch in batches)
    assert {s[0] for batch in batches for s in batch}.isdisjoint(session.world.same)
    dropped = [row for row in rows if row[2] == "dropped"]
    assert {row[4] for row in dropped} == {"no_signal"}
    assert {row[0] for row in dropped} >= session.world.same & {row[0] for row in rows}
    assert [row[1] for row in rows] == list(range(len(rows)))
    counts = [e.metrics.get("groups/dropped/no_signal", 0) for e in session.events if isinstance(e, StepEvent)]
    assert sum(counts) == len(dropped)


def test_groups_without_signal_are_kept_unless_dynamic_sampling_is_on(tmp_path: Path) -> None:
    session = Session(tmp_path, config("num_steps=1"))
    session.world.same = {f"ten/0/{r}" for r in range(ROWS)}
    session.go()
    (batch,) = session.world.batches
    assert len(batch.samples) == 12
    assert all(s.advantage == 0 for s in batch.samples)


@pytest.mark.parametrize(("rounds", "kept", "dropped"), [(1, [0], [1, 2]), (2, [0, 3], [1, 2, 4, 5])])
def test_when_the_budget_is_spent_the_step_trains_on_what_it_has(
    tmp_path: Path, rounds: int, kept: list[int], dropped: list[int]
) -> None:
    cfg = config("num_steps=1", "algorithm.dynamic_sampling=true", f"algorithm.max_sampling_rounds={rounds}")
    cursor = Cursor(Rows(), seed=cfg.seed, shuffle=True)
    order = [cursor.next().id for _ in range(9)]
    for jitter in range(4):
        session = Session(tmp_path / str(jitter), cfg, jitter)
        session.world.distinct = True
        session.world.same = {p for i, p in enumerate(order) if i % 3}
        assert session.go() == "finished"
        (batch,) = session.world.batches
        assert list(dict.fromkeys(s.prompt_id for s in batch.samples)) == [order[i] for i in kept]
        assert [r[:3] for r in session.ledger_rows] == [
            (order[i], i, "trained" if i in kept else "dropped") for i in sorted(kept + dropped)
        ]


def test_a_budget_spent_without_any_signal_ends_the_run_and_says_why(tmp_path: Path) -> None:
    session = Session(tmp_path, config("algorithm.dynamic_sampling=true", "algorithm.max_sampling_rounds=2"))
    session.world.same = {f"ten/{e}/{r}" for e in range(9) for r in range(ROWS)}
    with pytest.raises(RewardError, match="step 1: none of 6 groups has two different rewards"):
        session.go()


def test_a_resumed_run_with_dynamic_sampling_equals_one_never_stopped(tmp_path: Path) -> None:
    same = {f"ten/{e}/{r}" for e in range(9) for r in (0, 2, 3)}
    whole = Session(tmp_path / "whole", config("algorithm.dynamic_sampling=true"))
    whole.world.same = same
    whole.go()
    first = Session(tmp_path / "cut", config("algorithm.dynamic_sampling=true"), jitter=1)
    first.world.same = same
    first.world.on_update = lambda step: first.loop.stop("SIGTERM") if step == 2 else None
    first.go()
    second = Session(tmp_path / "cut", config("algorithm.dynamic_sampling=true"), jitter=2)
    second.world.same = same
    second.go()
    assert second.ledger_rows == whole.ledger_rows
    assert [essence(b) for b in first.world.batches + second.world.batches] == [essence(b) for b in whole.world.batches]


@pytest.mark.parametrize("masked", [False, True])
def test_truncated_samples_stay_in_the_baseline_and_may_be_left_out_of_the_loss(tmp_path: Path, masked: bool) -> None:
    session = Session(tmp_path, config("num_steps=2", f"algorithm.mask_truncated={masked}"))
    session.world.truncate_above = 4
    session.go()
    other = Session(tmp_path / "other", config("num_steps=2"))
    other.go()
    for batch, same in zip(session.world.batches, other.world.batches, strict=True):
        assert essence(batch) == essence(same)
        assert {s.loss_mask for s in batch.samples if s.num_tokens > 4} == {not masked}
        assert all(s.loss_mask for s in batch.samples if s.num_tokens <= 4)


def test_advantages_have_mean_zero_in_every_group(tmp_path: Path) -> None:
    session = Session(tmp_path, config())
    session.go()
    for batch in session.world.batches:
        for number in range(3):
            values = [s.advantage or 0.0 for s in batch.samples if s.group == number]
            assert abs(sum(values)) < 1e-9


def test_accuracy_is_measured_before_the_first_step_and_after_the_last(tmp_path: Path) -> None:
    prompts = [Rows().item(r, 0) for r in range(4)]
    session = Session(tmp_path, config("num_steps=2", "eval.threshold=2"), eval_prompts=prompts)
    session.go()
    steps = [e.step for e in session.events if isinstance(e, EvalEvent)]
    assert steps == [0, 2]
    assert [e.step for e in session.events if isinstance(e, StepEvent)] == [1, 2]
    for event in session.events:
        if isinstance(event, EvalEvent):
            assert event.accuracy in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.parametrize("kind", ["grpo", "rloo", "gae"])
def test_rewards_of_steps_end_a_run_that_has_no_use_for_them(tmp_path: Path, kind: str) -> None:
    session = Session(tmp_path, config(f"algorithm.advantage={kind}"))
    session.world.steps = {f"ten/0/{row}#2": (Step(0, 1.0),) for row in range(ROWS)}
    with pytest.raises(
        RewardError, match=rf"reward 'r' gives rewards of steps, .* {kind} .*use algorithm.advantage process"
    ):
        session.go()
    assert session.world.batches == []


def test_under_process_a_group_has_a_signal_when_two_steps_differ(tmp_path: Path) -> None:
    session = Session(tmp_path, config("algorithm.advantage=process", "algorithm.dynamic_sampling=true", "num_steps=3"))
    # Row 1: all samples the same two different steps, and so the same sum. Row 2: all steps equal, more of them in one sample.
    session.world.distinct = True
    session.world.steps = {"ten/0/1": (Step(0, 1.0), Step(1, 0.0)), "ten/0/2": (Step(0, 0.5),)} | {
        "ten/0/2#3": (Step(0, 0.5), Step(1, 0.5))
    }
    assert session.go() == "finished"
    assert [row[0] for row in session.ledger_rows if row[2] == "dropped"] == ["ten/0/2"]
    samples = [s for batch in session.world.batches for s in batch.samples]
    assert all(s.steps for s in samples)
    first, second = next(s for s in samples if s.prompt_id == "ten/0/1").steps
    assert (first.end, second.end) == (0, 1)
    assert second.value < 0
    assert first.value == pytest.approx(0.0, abs=1e-9)


class Company:
    """A scaler: which learner it is, by the steps after which it is replaced."""

    def __init__(self, session: Session, after: set[int]) -> None:
        self.session, self.after = session, after
        self.step = 0
        self.changed: list[tuple[int, int, int]] = []
        """(step, version of the state that the new learner got, prompts under way)."""

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        assert metrics["grad_norm"] == 1.0

    @property
    def wants_learners(self) -> bool:
        return self.step in self.after

    async def change_learners(self, place: CheckpointLocation | None) -> tuple[Keeper, World]:
        self.after.discard(self.step)
        world = self.session.world
        learner = Keeper(world)
        version, world.version = world.version, -1
        if place is None:
            world.version = 0
        else:
            await learner.load(place)
        assert world.version == version == self.step
        self.changed.append((self.step, version, len(self.session.loop.collector._under_way)))
        return learner, world


@pytest.mark.parametrize("staleness", [0, 2])
def test_other_learners_go_on_from_the_step_that_is_done_while_samples_stay_under_way(
    tmp_path: Path, staleness: int
) -> None:
    settings = ("num_steps=10", f"algorithm.max_staleness={staleness}", "checkpoint.every_steps=4")
    whole = Session(tmp_path / "whole", config(*settings))
    whole.go()
    session = Session(tmp_path / "scaled", config(*settings))
    company = Company(session, {0, 3, 4, 7})
    session.loop.roles = replace(session.loop.roles, scaler=company)
    assert session.go() == "finished"
    assert [step for step, _, _ in company.changed] == [0, 3, 4, 7]
    if staleness:
        assert max(under_way for *_, under_way in company.changed) > 0
    assert session.ledger_rows == whole.ledger_rows
    assert session.world.num_drawn == whole.world.num_drawn, "no sample is drawn again"
    if not staleness:
        assert [essence(b) for b in session.world.batches] == [essence(b) for b in whole.world.batches]


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_poisoned_prompt_is_dropped_by_name_and_the_next_takes_its_place(tmp_path: Path, staleness: int) -> None:
    session = Session(tmp_path, config("num_steps=6", f"algorithm.max_staleness={staleness}"))
    world = session.world
    generate = world.generate

    async def ends_engines(request: SampleRequest) -> SampleInfo:
        info = await generate(request)
        if request.prompt_id == "ten/0/4":
            raise PoisonedError("prompt ten/0/4 ends rollout engines")
        return info

    world.generate = ends_engines
    lines: list[dict[str, float]] = []
    session.loop.trackers = [SimpleNamespace(log=lambda step, metrics: lines.append(metrics), close=lambda: None)]
    assert session.go() == "finished"
    (dropped,) = [row for row in session.ledger_rows if row[2] != "trained"]
    assert (dropped[0], dropped[2], dropped[4]) == ("ten/0/4", "dropped", "poisoned")
    trained = [row[0] for row in session.ledger_rows if row[2] == "trained"]
    assert len(trained) == len(set(trained)) == 18
    assert [e.text for e in session.events if isinstance(e, MessageEvent) and e.level == "error"] == [
        "prompt ten/0/4 ends rollout engines. It is set aside, and the next prompt takes its place"
    ]
    assert sum(line.get("groups/dropped/poisoned", 0) for line in lines) == 1
