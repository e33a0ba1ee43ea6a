"""When lost learners start again and when a run ends of them, without a cluster."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.control import recovery
from actors.control.context import RunContext
from actors.control.recovery import outlive_learners
from grpo_ray.errors import CheckpointError, ConfigError, LostSamplesError, NoMemoryError, WorkerError
from grpo_ray.run.run_dir import RunDir
from grpo_ray.telemetry.events import MessageEvent
from tests.recipes import run_config

DIED = WorkerError("learner-0 died")


@dataclass
class Run:
    """A run whose training ends as it is told, one entry an attempt: an error after so many steps, or how the run ends."""

    path: Path
    attempts: list[tuple[int, Exception | str]]
    starts: list[Exception | None] = field(default_factory=list)
    """How each start of new learners ends, of the first ones; all others succeed."""
    lost_learner: str | None = "learner-0 died"
    num_starts: int = 0
    told: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = RunContext("grpo", RunDir(self.path), (), self._emit, None)

    def _emit(self, event: Any) -> None:
        assert isinstance(event, MessageEvent)
        self.told.append(event.text)

    async def _train(self) -> str:
        if not self.attempts:
            pytest.fail("it trains once more than it should")
        step, end = self.attempts.pop(0)
        loop: Any = SimpleNamespace(step=step)
        self.context.loop = loop
        if isinstance(end, Exception):
            raise end
        return end

    async def _start_again(self) -> None:
        self.num_starts += 1
        if self.num_starts > 50:
            pytest.fail("learners start for ever")
        if self.starts and (error := self.starts.pop(0)) is not None:
            raise error

    def end(self, *overrides: str) -> str:
        config, workers = run_config("learner.max_restarts=2", *overrides), self
        return asyncio.run(outlive_learners(self.context, config, workers, self._train, self._start_again))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "START_AGAIN_S", 0.01)
    monkeypatch.setattr(recovery, "LONGEST_WAIT_S", 0.02)
    monkeypatch.setattr(recovery, "memory_wait_s", lambda number: 0.01)


def test_learners_that_died_start_again_and_the_run_says_from_where(tmp_path: Path) -> None:
    run = Run(tmp_path, [(4, DIED), (9, "finished")])
    assert run.end() == "finished"
    assert run.num_starts == 1
    assert run.told == [
        "learner-0 died\nStep 5 can't be done with what is left; learners start again from the beginning"
    ]


def test_only_deaths_without_a_step_more_count(tmp_path: Path) -> None:
    run = Run(tmp_path, [(step, DIED) for step in (3, 3, 4, 4, 5)] + [(6, "finished")])
    assert run.end() == "finished"
    assert run.num_starts == 5
    run = Run(tmp_path, [(3, DIED)] * 3)
    with pytest.raises(WorkerError, match="learner-0 died"):
        run.end()
    assert run.num_starts == 2


@pytest.mark.parametrize(
    ("error", "lost", "starts"),
    [
        (LostSamplesError("its node died"), None, 1),
        (ExceptionGroup("tasks", [ValueError("x"), LostSamplesError("its node died")]), None, 1),
        (WorkerError("a sampler died"), None, 0),
        (ValueError("a bug"), None, 0),
    ],
)
def test_what_is_not_lost_with_learners_or_samples_ends_the_run(
    tmp_path: Path, error: Exception, lost: str | None, starts: int
) -> None:
    run = Run(tmp_path, [(1, error), (2, "finished")], lost_learner=lost)
    if starts:
        assert run.end() == "finished"
    else:
        with pytest.raises(type(error), match=str(error)):
            run.end()
    assert run.num_starts == starts


def test_a_run_that_is_asked_to_stop_starts_nothing_again(tmp_path: Path) -> None:
    run = Run(tmp_path, [(1, DIED)])
    run.context.stop_reason = "stopped"
    with pytest.raises(WorkerError):
        run.end()
    assert run.num_starts == 0


def test_memory_that_runs_out_again_and_again_ends_the_run_with_the_option_to_lower(tmp_path: Path) -> None:
    run = Run(tmp_path, [(1, NoMemoryError("learner-0 died for lack of memory"))] * 3)
    with pytest.raises(NoMemoryError, match=r"3 times without a step more \(learner\.max_restarts\)"):
        run.end()


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    run = Run(tmp_path, [(4, DIED)])
    with pytest.raises(CheckpointError, match=r"(?s)learner-0 died.*are not there any more"):
        run.end()
    assert run.num_starts == 0


def test_learners_that_die_while_they_start_are_started_once_more_until_the_deadline(tmp_path: Path) -> None:
    run = Run(tmp_path, [(1, DIED), (2, "finished")], starts=[WorkerError("its node died"), None])
    assert run.end() == "finished"
    assert run.num_starts == 2
    assert run.told[1] == "its node died\nLearners start again in 0.01 s"
    run = Run(tmp_path, [(1, DIED)], starts=[WorkerError("its node died")] * 100)
    with pytest.raises(WorkerError, match="its node died"):
        run.end("deadlines.start_s=0.1")
    assert run.num_starts < 15
    run = Run(tmp_path, [(1, DIED)], starts=[ConfigError("no such model")])
    with pytest.raises(ConfigError):
        run.end()
    assert run.num_starts == 1
